"""A run that goes to its end even if it does not fit the plan, as other ranks go with it."""

from typing import Any

from torch import Tensor

from funcghost.engine.capture import Capture, Carried
from funcghost.engine.walker import Visit
from funcghost.errors import MismatchError
from funcghost.ops.values import Value


class ToTheEnd(Capture):
    """A capture that tells by its end what did not fit, and runs what comes after that as it is."""

    unfit: MismatchError | None = None

    def visit(self, visit: Visit[Carried]) -> Any:
        """As that of a capture, as long as the plan fits."""
        if self.unfit is None:
            try:
                return super().visit(visit)
            except MismatchError as error:
                self.unfit = error
        return self.run(visit)

    def meet(self, tensor: Tensor, value: Value[Carried], number: int) -> None:
        """As that of a capture, as long as the plan fits."""
        if self.unfit is None:
            try:
                super().meet(tensor, value, number)
            except MismatchError as error:
                self.unfit = error

    def finish(self, losses: Tensor) -> Tensor:
        """As that of a capture.

        Raises:
            MismatchError: the run did not fit the plan.
        """
        if self.unfit is not None:
            raise self.unfit
        return super().finish(losses)
