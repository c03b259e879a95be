"""Models that break engines of this kind, all of them: each part adds its own to `CASES` when it is imported."""

from tests.models import awkward_derivatives, awkward_disguises, awkward_kinds, awkward_uses
from tests.models.awkward_cases import CASES
from tests.models.awkward_sequels import SEQUELS
from tests.models.awkward_uses import Hidden

PARTS = (awkward_uses, awkward_disguises, awkward_derivatives, awkward_kinds)

__all__ = ["CASES", "PARTS", "SEQUELS", "Hidden"]
