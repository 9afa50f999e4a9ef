"""Every byte of a run compared with its checksum; what several steps have in common is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from moetier.access import ExpertKey
from moetier.errors import StoreError
from moetier.stores.manifest import Stored
from moetier.stores.runfamily import Records
from moetier.stores.runsteps import Steps


def damaged(
    steps: Steps, families: Mapping[str, Records], step: int | None, progress: Callable[[int, int], None]
) -> Iterator[str]:
    """Read the records and attachments of a step, or of all, and say what is damaged: a line for each.

    `progress` is told of bytes of records, done and of all. Raises `ConfigError` for a step that is not there.
    """
    broken = {number: error for (_, number), error in steps.damaged.items()}
    chosen = steps.whole if step is None else [steps.find(step)] if step not in broken else []
    yield from (str(error) for number, error in broken.items() if step in (None, number))
    versions: dict[tuple[str, int, ExpertKey, tuple[int, ...]], tuple[Stored, list[str]]] = {}
    for manifest in chosen:
        for name, table in manifest.families.items():
            for key, stored in table.records.items():
                own = versions.setdefault((name, stored.offset, key, stored.sums), (stored, []))
                own[1].append(str(manifest.step))
    done, total = 0, sum(stored.nbytes for stored, _ in versions.values())
    for (name, _, key, _), (stored, numbers) in sorted(versions.items(), key=lambda item: item[0][:3]):
        try:
            families[name].check(key, stored)
        except StoreError as error:
            yield f"step {', '.join(numbers)}: {error}"
        done += stored.nbytes
        progress(done, total)
    for manifest in chosen:
        for attachment in manifest.attachments:
            try:
                steps.attachment(manifest, attachment)
            except StoreError as error:
                yield str(error)
