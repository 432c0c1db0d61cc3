"""The bar that shows how far annealing has come."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from ebm_ppl.walkers.site import Progress


@contextmanager
def annealing_bar(
    what: str, progress_bar: bool, num_passes: int = 1
) -> Iterator[Progress]:
    """Show temperatures done, after the first second.

    Args:
        what: What the walkers are for, before the bar.
        progress_bar: Whether it is shown.
        num_passes: Passes over the temperatures that are to come.
    """
    with tqdm(
        desc=what, unit="temperature", delay=1.0, disable=not progress_bar
    ) as bar:

        def progress(done: int, num_temperatures: int) -> None:
            bar.total = num_passes * num_temperatures
            bar.update(done)

        yield progress
