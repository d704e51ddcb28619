"""What one's own network, or one recorded update of it, leaks."""

from leakbench.audit.findings import Audit, Behind, Sight
from leakbench.audit.gate import Gate, parse_gate
from leakbench.audit.given import Scale, Update, factory, read_update
from leakbench.audit.run import audit_model, audit_update

__all__ = [
    "Audit",
    "Behind",
    "Gate",
    "Scale",
    "Sight",
    "Update",
    "audit_model",
    "audit_update",
    "factory",
    "parse_gate",
    "read_update",
]
