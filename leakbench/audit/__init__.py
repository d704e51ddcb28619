"""Audits: how much one's own network, or one recorded update of it, leaks."""

from leakbench.audit.fail_rule import FailRule
from leakbench.audit.findings import Audit, DefenseFindings, ImageFinding
from leakbench.audit.given import (
    AuditedNetwork,
    factory,
    image_names,
    images_of,
    load_network,
    read_image,
    read_images,
    shape_of,
)
from leakbench.audit.recipe import StatedRecipe, read_recording
from leakbench.audit.run import AuditOptions, audit_model, audit_update

__all__ = [
    "Audit",
    "AuditOptions",
    "AuditedNetwork",
    "DefenseFindings",
    "FailRule",
    "ImageFinding",
    "StatedRecipe",
    "audit_model",
    "audit_update",
    "factory",
    "image_names",
    "images_of",
    "load_network",
    "read_image",
    "read_images",
    "read_recording",
    "shape_of",
]
