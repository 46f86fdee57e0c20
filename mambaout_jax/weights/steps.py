"""The steps in the checkpoints folder of a run: which are complete, and renaming of damaged ones.

On a disk Orbax writes a step under another name and renames it. A bucket cannot rename a folder as
one: there Orbax writes the step in place, and the object MARKER when everything else is there.
"""

import errno
import json
import re
import time

from etils import epath

from mambaout_jax.bucket import children, is_bucket, open_bucket, split

MARKER = "commit_success.txt"
METADATA = "_CHECKPOINT_METADATA"
DAMAGED = ".damaged"
UNFINISHED = ".orbax-checkpoint-tmp"  # follows the name of what Orbax is writing on a disk


def whole_steps(folder: epath.Path) -> dict[int, epath.Path]:
    """Returns the whole steps of a checkpoints folder, by number, in order."""
    steps = {int(path.name): path for path in children(folder) if is_step(path)}
    return {step: steps[step] for step in sorted(steps) if is_whole(steps[step])}


def is_step(path: epath.Path) -> bool:
    """Returns whether a path is named as Orbax names a step: by its number."""
    return bool(re.fullmatch("0|[1-9][0-9]*", path.name))


def is_whole(step: epath.Path) -> bool:
    """Returns whether a step was saved to its end."""
    return (step / MARKER).exists() if is_bucket(step) else step.is_dir()


def mark_copied_steps(folder: epath.Path) -> None:
    """Writes the markers of whole steps that lack them: copies of a disk's in a bucket.

    Without them Orbax takes a step in a bucket for unfinished, and deletes it. Orbax 0.12 writes
    them on disks as well.
    """
    for step in children(folder) if is_bucket(folder) else ():
        if is_step(step) and not is_whole(step) and _was_committed(step):
            items = [path for path in children(step) if path.is_dir()]
            for path in [*items, step]:
                (path / MARKER).write_text("copied from a disk")


def _was_committed(step: epath.Path) -> bool:
    """Returns whether Orbax's own record says that the step was saved to its end."""
    try:
        return bool(json.loads((step / METADATA).read_text())["commit_timestamp_nsecs"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return False


def set_aside(step: epath.Path) -> None:
    """Renames a damaged step to STEP.damaged, so that it is neither used nor lost.

    Where a step of that number was set aside before, the name is STEP.2.damaged, and so on.

    In a bucket its objects are renamed one by one. Until that is done both folders have the marker,
    without which Orbax would delete them, and what is left is found and set aside the next time.
    """
    target, count = step.parent / f"{step.name}{DAMAGED}", 1
    while target.exists():
        count += 1
        target = step.parent / f"{step.name}.{count}{DAMAGED}"
    if not is_bucket(step):
        step.rename(target)
        return
    bucket, (_, key), (_, new) = open_bucket(step), split(step), split(target)
    marker = bucket.blob(f"{key}/{MARKER}")
    bucket.copy_blob(marker, bucket, f"{new}/{MARKER}")
    for blob in list(bucket.list_blobs(prefix=f"{key}/")):
        if blob.name != marker.name:
            bucket.rename_blob(blob, new + blob.name.removeprefix(key))
    marker.delete()


def remove_unfinished(folder: epath.Path, name: str = "*") -> None:
    """Removes what failed saves left in a folder of a disk.

    Args:
        folder: where they wrote.
        name: of what they wrote.
    """
    unseen = 0
    for _ in range(100):  # until Orbax's pending writes no longer add to it
        found: list[epath.Path] = []
        try:
            found += folder.glob(f"{name}{UNFINISHED}*")
            for path in found:
                path.rmtree()
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
                return
        unseen = 0 if found else unseen + 1
        if unseen == 3:
            return
        time.sleep(0.1)
