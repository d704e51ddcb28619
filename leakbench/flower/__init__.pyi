from .mods import mod as mod
from .mods import restore as restore
from .recording import record as record
from .simulation import Failure as Failure
from .simulation import simulate as simulate

OLDEST: tuple[int, int]

def require(*, ray: bool = False) -> None: ...
