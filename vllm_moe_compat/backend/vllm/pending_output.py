"""The output of a step whose pass may still run."""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class PendingOutput(AsyncModelRunnerOutput):
    """The output of a step whose pass may still run.

    With async scheduling vLLM asks for the output after it has scheduled the next step, so the
    engine works while MLX computes.
    """

    def __init__(self, complete: Callable[[], ModelRunnerOutput]) -> None:
        """``complete`` waits for the pass and makes the output; it is called once."""
        self._complete = complete
        self._output: ModelRunnerOutput | None = None

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output.

        Must be called on the thread that runs the steps, since MLX does not evaluate their graphs
        on another one. The only executor that the platform allows does so.
        """
        if self._output is None:
            self._output = self._complete()
        return self._output
