"""Checkpoints of a run: asynchronous, atomic, restored bit for bit.

    DIRECTORY/1000/model/      params and batch_stats: what evaluation and export need
    DIRECTORY/1000/training/   everything else of the state: step, optimiser state
    DIRECTORY/1000/extra/      JSON, with checksums of it and of every array

The state may be any pytree (a `flax.struct` dataclass, named tuples of optax): on disk it is a
plain nested dictionary of arrays by path, so that it can be read without the code that wrote it.
All processes of a run share DIRECTORY (a common file system or `gs://`) and call each method.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from common.io.errors import UserError
from common.io.paths import is_remote
from common.io.storage_errors import free_space, is_disk_full, is_file_error
from common.training import distributed
from common.training.checkpoint_items import (
    CHECKSUMS,
    MODEL_FIELDS,
    checksums,
    describe,
    flatten,
    path_name,
    read_items,
    saved_arrays,
    silence_orbax_tracebacks,
    split_fields,
    text_checksum,
    to_nested_dict,
)

_MAX_NAMED = 4  # differing parameters spelled out in an error
_TRIES = 10  # to read the newest checkpoint before the training beside removes it
_REMOVING_SECONDS = 2.0  # that the files of a checkpoint go one after another
COMMITTED = "commit_success.txt"  # orbax writes it last


class CheckpointRemoved(UserError):
    """A checkpoint went while it was read: the training beside keeps newer ones."""


class Checkpoints:
    """The checkpoints in one directory.

    Opening and reading change nothing on disk, so that evaluation may run next to training.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
    ):
        """Opens a directory, which may not exist yet.

        Args:
          directory: such as WORKDIR/checkpoints.
          keep_last: how many of the newest stay.
          keep_every_steps: multiples of this stay as well; with the steps of an epoch, the epoch
            ends that `scripts.average_checkpoints` needs.
        """
        path = epath.Path(directory)
        # orbax wants absolute paths; an address is one, of which pathlib would make a local folder.
        self.directory = path if is_remote(path) else path.absolute()
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._manager: ocp.CheckpointManager | None = None  # made by the first save
        self._saved: int | None = None  # the last save, which may still be under way
        silence_orbax_tracebacks()
        for path in self._half_written():
            _print_once(f"note: {path}: half-written checkpoint, ignored")

    def save(self, step: int, state: Any, extra: Mapping[str, Any], wait: bool = False) -> None:
        """Copies the state to the host, then writes it in the background.

        The checkpoint appears by a rename once it is complete. A step that exists is left alone.

        Args:
          step: number of finished steps.
          state: pytree of arrays with the fields 'params' and 'batch_stats' at the top.
          extra: anything that JSON can hold.
          wait: until it is on disk.

        Raises:
          UserError: this or the previous write failed, such as on a full disk; earlier
            checkpoints are intact.
        """
        if step == self._saved or step in self.all_steps():
            if wait:
                self.wait()
            return
        model, training = split_fields(to_nested_dict(state))
        sums = checksums({"model": model, "training": training})
        saved = {**extra, CHECKSUMS: sums | {"extra": text_checksum(extra)}}
        items = {"model": ocp.args.StandardSave(model), "extra": ocp.args.JsonSave(saved)}
        if training:
            items["training"] = ocp.args.StandardSave(training)
        with self._explaining_failures():
            if self._manager is None:
                self._manager = self._make_manager()
            # `force`: orbax would silently skip a step older than the latest one.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._saved = step
        if wait:
            self.wait()

    def check(self) -> None:
        """Raises the error of a background write that has failed. Cheap; call it at log lines."""
        if self._manager is not None:
            with self._explaining_failures():
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
          UserError: a write failed.
        """
        if self._manager is not None:
            with self._explaining_failures():
                self._manager.wait_until_finished()
                self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for saves and lets go of the threads."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """After an error, waits for the save under way: it is of a state before the error.

        With several processes the others may wait for this one, which ends.
        """
        if kind is not None and self._manager is not None and jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error is the one to be said
                self._manager.wait_until_finished()

    def all_steps(self) -> list[int]:
        """Steps of complete checkpoints, ascending."""
        return sorted(
            int(path.name)
            for path in self._children()
            if path.name.isdecimal() and (path / COMMITTED).exists()
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.all_steps(), default=None)

    def restore(self, step: int | None, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          step: None means the newest.
          abstract_state: the tree to fill: `jax.ShapeDtypeStruct`s with shardings, which the
            arrays get whatever they were saved with, or without, which gives NumPy arrays.

        Returns:
          the state, equal bit for bit to what was saved, and the `extra` of that save.

        Raises:
          UserError: no such step; a checkpoint of another model; a damaged checkpoint. There is
            no silent fall-back to an older one.
        """
        step = self.choose_step(step)
        paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_state)
        names = [path_name(path) for path, _ in paths]
        model, training = split_fields(to_nested_dict(abstract_state))
        restored = self._read(step, {"model": model, "training": training})
        arrays = flatten({**restored["model"], **restored["training"]})
        return jax.tree.unflatten(treedef, [arrays[name] for name in names]), restored["extra"]

    def restore_params(
        self, step: int | None = None, abstract: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads what evaluation and export need: params and batch_stats.

        Args:
          step: None means the newest, see `restore_newest`.
          abstract: {'params': ..., 'batch_stats': ...}, as `abstract_state` of `restore`; None
            takes what the checkpoint has, as NumPy arrays.

        Returns:
          {'params': ..., 'batch_stats': ...}, nested dictionaries, and the `extra` of the save.

        Raises:
          UserError: as `restore`.
        """
        if step is None:
            return self.restore_newest(abstract)[1:]
        step = self.choose_step(step)
        wanted = None if abstract is None else to_nested_dict(dict(abstract))
        read = self._read(step, {"model": wanted})
        return {field: read["model"].get(field, {}) for field in MODEL_FIELDS}, read["extra"]

    def restore_newest(
        self, abstract: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Step, and `restore_params`, of the newest checkpoint beside a training that saves more.

        One that the training removes while it is read is given up for the next. (Not with several
        processes: those that could read it would wait for the others.)

        Raises:
          UserError: as `restore`.
        """
        for left in reversed(range(_TRIES)):
            step = self.choose_step(None)
            try:
                return step, *self.restore_params(step, abstract)
            except CheckpointRemoved as error:
                if not left or jax.process_count() > 1:
                    raise
                _print_once(f"note: {error}; the next one is taken")
        raise AssertionError("unreachable")

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """The `extra` of a save (None: of the newest) alone, cheap.

        Raises:
          UserError: as `restore`.
        """
        return self._read(self.choose_step(step), {})["extra"]

    def damage(self, step: int) -> str:
        """Why a checkpoint cannot be read, "" if every byte can. No other process takes part."""
        path = self.directory / str(step)
        try:
            items = [item for item in ("model", "training") if (path / item).exists()]
            read_items(path, saved_arrays(path, tuple(items)), alone=True)
        except Exception as error:  # tensorstore reports damage by several exception types
            return _first_line(error)
        return ""

    def _make_manager(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            for path in self._half_written():
                path.rmtree()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep_last, keep_period=self._keep_every_steps
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _children(self) -> list[epath.Path]:
        return sorted(self.directory.iterdir()) if self.directory.exists() else []

    def _half_written(self) -> list[epath.Path]:
        """What a killed save or an interrupted copy left behind (or one that is under way)."""
        return [
            path
            for path in self._children()
            if ".orbax-checkpoint-tmp" in path.name
            or (path.name.isdecimal() and not (path / COMMITTED).exists())
        ]

    def choose_step(self, step: int | None) -> int:
        """The step itself, or the newest one for None; the same in all processes.

        Raises:
          UserError: there is no such checkpoint, or processes see different ones.
        """
        self.wait()
        # The second look is for a training that replaced its only checkpoint during the first.
        steps = self.all_steps() or self.all_steps()
        if not steps:
            raise UserError(f"{self.directory}: no checkpoint found, expected at least one")
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"{self.directory}: no checkpoint of step {chosen}, found {known}")
        if jax.process_count() > 1:
            first = distributed.same_everywhere(chosen)
            if first != chosen:
                raise UserError(
                    f"{self.directory}: process {jax.process_index()} sees checkpoint {chosen}, "
                    f"process 0 sees {first}; expected one file system shared by all processes"
                )
        return chosen

    def _read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items into the given nested dictionaries (None: as NumPy, whatever is there)."""
        try:
            saved = saved_arrays(self.directory / str(step), tuple(wanted))
            self._refuse_other_model(step, wanted, saved)
            return read_items(
                self.directory / str(step),
                {item: saved[item] if wanted[item] is None else wanted[item] for item in wanted},
            )
        except UserError:
            raise
        except Exception as error:  # tensorstore reports damage by several exception types
            if self._is_removed(step):
                raise CheckpointRemoved(
                    f"{self.directory}: checkpoint {step} was removed while it was read"
                ) from error
            raise UserError(self._describe_damage(step, error)) from error

    def _is_removed(self, step: int) -> bool:
        """Whether a checkpoint is gone, or is going because there is a newer one."""
        deadline = time.monotonic() + _REMOVING_SECONDS
        while (self.directory / str(step) / COMMITTED).exists():
            if step == self.latest_step() or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _refuse_other_model(
        self, step: int, wanted: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> None:
        differences = []
        for item, tree in wanted.items():
            if tree is None:
                continue
            ours, theirs = flatten(tree), flatten(saved[item])
            for name in sorted(ours.keys() | theirs.keys()):
                has, needs = describe(theirs.get(name)), describe(ours.get(name))
                if has != needs:
                    differences.append(f"{name}: checkpoint has {has}, model has {needs}")
        if differences:
            named = "; ".join(differences[:_MAX_NAMED])
            if len(differences) > _MAX_NAMED:
                named += f"; and {len(differences) - _MAX_NAMED} more"
            raise UserError(f"{self.directory / str(step)}: checkpoint of another model ({named})")

    def _describe_damage(self, step: int, error: Exception) -> str:
        path, reason = self.directory / str(step), _first_line(error)
        others = [other for other in reversed(self.all_steps()) if other != step]
        intact = next((other for other in others if not self.damage(other)), None)
        if intact is None:
            advice = "no other checkpoint is intact"
        elif intact < step:
            advice = f"the newest intact one is step {intact}; to go on from it, remove {path}"
        else:
            advice = f"the newest intact one is step {intact}"
        return f"{path}: damaged checkpoint ({reason}); {advice}"

    @contextlib.contextmanager
    def _explaining_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_file_error(error):
                raise
            steps = self.all_steps()
            earlier = f"the earlier checkpoint {steps[-1]} is intact" if steps else "none is lost"
            if is_disk_full(error):
                reason = f"disk full{free_space(self.directory)}"
                advice = "free some space and run the same command again"
            else:
                reason = f"cannot write ({str(error).splitlines()[0][:200]})"
                advice = "the same command goes on from there"
            self._give_up()
            raise UserError(
                f"{self.directory}: {reason} while saving a checkpoint; {earlier}; {advice}"
            ) from error

    def _give_up(self) -> None:
        """Ends the writer after a failed save and takes away what it left, where it can.

        What stays is no harm: readers ignore it and the next run's first save removes it.
        """
        # With several processes, closing would wait for the other ones.
        if self._manager is not None and jax.process_count() == 1:
            with contextlib.suppress(Exception):  # raises the same failure again
                self._manager.close()
        self._manager = None
        if jax.process_index() == 0:
            for path in self._half_written():
                with contextlib.suppress(OSError):  # a thread of orbax may still write there
                    path.rmtree()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _print_once(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
