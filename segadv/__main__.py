"""`python -m segadv` is the command `segadv`; `torchrun -m segadv` runs it in several processes."""

from __future__ import annotations

from .cli import main
from .distributed import leave

if __name__ == "__main__":
    leave(main())
