import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct

from common.io.errors import UserError
from common.training import checkpoint
from common.training.checkpoint import Checkpoints
from common.training.checkpoint_items import to_nested_dict
from common.training.distributed import make_mesh, replicated

ROOT = Path(__file__).parents[3]


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState


def make_state(seed=0, width=4, stats=True):
    """Values of all magnitudes, so that any rounding on the way would show."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(3, width)) * 10.0 ** rng.integers(-30, 30, (3, width))
    mean = jnp.asarray(rng.normal(size=3), jnp.float32)
    params = {
        "conv1": {"kernel": jnp.asarray(kernel, jnp.float32)},
        "head": {"bias": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    _, opt_state = tx.update(params, tx.init(params), params)
    return State(
        step=jnp.int32(seed),
        params=params,
        batch_stats={"norm": {"mean": mean}} if stats else {},
        opt_state=opt_state,
    )


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_equal_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.fixture
def saved(tmp_path):
    """Steps 1 and 2 of a run."""
    with_two = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        with_two.save(step, make_state(step), {"epoch": step})
    with_two.close()
    return tmp_path / "checkpoints"


def test_restored_state_equals_the_saved_one_bit_for_bit(saved):
    mesh = make_mesh()
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest_step() == 2
    state, extra = checkpoints.restore(None, abstract(make_state(), replicated(mesh)))
    assert_equal_bits(state, make_state(2))
    assert extra == {"epoch": 2}
    assert state.params["conv1"]["kernel"].sharding == replicated(mesh)
    state, extra = checkpoints.restore(1, abstract(make_state()))
    assert_equal_bits(state, make_state(1))
    assert extra == {"epoch": 1} == checkpoints.read_extra(1)


def test_saving_copies_before_the_next_step_reuses_the_memory(tmp_path):
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep_last=10)
    value = jnp.zeros(200_000)
    for step in range(1, 5):
        value = update(value)
        checkpoints.save(step, {"params": {"w": value}}, {})
        value = update(value)
    checkpoints.close()
    for step in range(1, 5):
        variables, _ = checkpoints.restore_params(step)
        np.testing.assert_array_equal(variables["params"]["w"], 2 * step - 1)


def test_evaluation_reads_parameters_and_statistics_alone(saved):
    variables, extra = Checkpoints(saved).restore_params()
    assert_equal_bits(
        variables, {"params": make_state(2).params, "batch_stats": make_state(2).batch_stats}
    )
    assert extra == {"epoch": 2}
    shutil.rmtree(saved / "2" / "training")  # evaluation does not need it
    wanted = {"params": make_state().params, "batch_stats": make_state().batch_stats}
    variables, _ = Checkpoints(saved).restore_params(2, abstract(wanted, replicated(make_mesh())))
    assert isinstance(variables["params"]["conv1"]["kernel"], jax.Array)


def test_models_without_statistics(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = make_state(3, stats=False)
    checkpoints.save(3, state, {}, wait=True)
    restored, _ = checkpoints.restore(3, abstract(state))
    assert_equal_bits(restored, state)
    assert checkpoints.restore_params()[0]["batch_stats"] == {}
    checkpoints.close()


def test_retention_keeps_the_newest_and_the_epoch_ends(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every_steps=4)
    for step in range(1, 12):
        checkpoints.save(step, {"params": {"w": np.zeros(2)}}, {})
    checkpoints.close()
    assert checkpoints.all_steps() == [4, 8, 10, 11]


def test_saving_a_step_again_changes_nothing(saved):
    checkpoints = Checkpoints(saved)
    checkpoints.save(2, make_state(7), {}, wait=True)
    assert_equal_bits(checkpoints.restore(2, abstract(make_state()))[0], make_state(2))


def test_reading_creates_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "nowhere")
    assert checkpoints.latest_step() is None and checkpoints.all_steps() == []
    with pytest.raises(UserError, match="no checkpoint found"):
        checkpoints.restore(None, abstract(make_state()))
    checkpoints.close()
    assert not (tmp_path / "nowhere").exists()


def test_an_unknown_step_is_refused_with_the_known_ones(saved):
    with pytest.raises(UserError, match="no checkpoint of step 9, found 1, 2"):
        Checkpoints(saved).restore_params(9)


def test_checkpoint_of_another_model_names_what_differs(saved):
    other = make_state(width=8)
    other.params["tail"] = other.params.pop("head")
    other.batch_stats["other"] = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    with pytest.raises(UserError) as error:
        Checkpoints(saved).restore(2, abstract(other))
    text = str(error.value)
    assert "checkpoint of another model" in text and str(saved / "2") in text
    assert "params/conv1/kernel: checkpoint has float32[3,4], model has float32[3,8]" in text
    assert "params/head/bias: checkpoint has bfloat16[5], model has nothing" in text
    assert "and 2 more" in text and "\n" not in text
    wanted = {"params": other.params, "batch_stats": other.batch_stats}
    with pytest.raises(UserError, match="another model"):
        Checkpoints(saved).restore_params(2, abstract(wanted))


@pytest.mark.parametrize("name", ["3.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-17", "3"])
def test_half_written_checkpoints_are_ignored_and_named(saved, capsys, name):
    shutil.copytree(saved / "2", saved / name)
    (saved / name / "commit_success.txt").unlink()
    checkpoints = Checkpoints(saved)
    assert f"{name}: half-written checkpoint, ignored" in capsys.readouterr().out
    assert checkpoints.latest_step() == 2
    assert (saved / name).exists()  # it may be a save of a run that goes on
    checkpoints.save(3, make_state(3), {}, wait=True)
    assert_equal_bits(checkpoints.restore(None, abstract(make_state()))[0], make_state(3))
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_a_checkpoint_that_the_training_beside_removes_is_given_up_for_the_next(
    tmp_path, capsys, monkeypatch
):
    """With keep_last=1 a reader loses this race in half of its tries."""
    training = Checkpoints(tmp_path, keep_last=1)
    training.save(1, make_state(1), {}, wait=True)
    read, looks = checkpoint.read_items, []

    def overtaken(path, wanted):
        looks.append(path.name)
        if len(looks) < 3:
            training.save(len(looks) + 1, make_state(len(looks) + 1), {}, wait=True)
            assert not path.exists()
        return read(path, wanted)

    monkeypatch.setattr(checkpoint, "read_items", overtaken)
    step, variables, _ = Checkpoints(tmp_path).restore_newest()
    assert step == 3 and looks == ["1", "2", "3"]
    assert_equal_bits(variables["params"], to_nested_dict(make_state(3).params))
    said = capsys.readouterr().out
    assert "checkpoint 1 was removed while it was read; the next one is taken" in said
    # A step that was asked for has no next one.
    looks.clear()
    with pytest.raises(UserError, match="checkpoint 3 was removed while it was read$"):
        Checkpoints(tmp_path).restore_params(3)
    training.close()


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_checkpoint_is_named_with_the_newest_intact_one(saved, damage):
    for path in (saved / "2" / "model").rglob("d/*"):
        if damage == "truncate":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
    for restore in (
        lambda c: c.restore(None, abstract(make_state())),
        lambda c: c.restore_params(),
    ):
        with pytest.raises(UserError) as error:
            restore(Checkpoints(saved))
        text = str(error.value)
        assert f"{saved / '2'}: damaged checkpoint" in text and "\n" not in text
        assert f"newest intact one is step 1; to go on from it, remove {saved / '2'}" in text
    shutil.rmtree(saved / "2")  # the advice works
    assert_equal_bits(Checkpoints(saved).restore(None, abstract(make_state()))[0], make_state(1))


def test_arrays_that_changed_on_disk_are_damage(saved):
    """As a flipped bit that still unpacks: other values of the right shape."""
    path = saved / "2" / "extra" / "metadata"
    extra = json.loads(path.read_text())
    assert sorted(extra["checksums"])[1].startswith("model/batch_stats/")
    extra["checksums"]["model/params/conv1/kernel"] ^= 1
    path.write_text(json.dumps(extra))
    for restore in (
        lambda c: c.restore(None, abstract(make_state())),
        lambda c: c.restore_params(),
    ):
        with pytest.raises(UserError) as error:
            restore(Checkpoints(saved))
        assert "conv1/kernel: not the values that were saved" in str(error.value)
        assert "newest intact one is step 1" in str(error.value)
    del extra["checksums"]  # as checkpoints of earlier versions
    path.write_text(json.dumps(extra))
    assert_equal_bits(Checkpoints(saved).restore(None, abstract(make_state()))[0], make_state(2))


def test_text_that_changed_on_disk_is_damage(saved):
    """As `num_steps` or `parts` with a flipped bit: no array tells of it."""
    path = saved / "2" / "extra" / "metadata"
    path.write_text(path.read_text().replace('"epoch": 2', '"epoch": 3'))
    for read in (lambda c: c.read_extra(), lambda c: c.restore_params()):
        with pytest.raises(UserError, match="damaged checkpoint .extra: not the values that were"):
            read(Checkpoints(saved))


def test_damage_of_all_checkpoints_is_said(saved):
    for path in saved.rglob("_METADATA"):
        path.write_text("{")
    with pytest.raises(UserError, match="no other checkpoint is intact"):
        Checkpoints(saved).restore_params()


def test_a_full_disk_ends_in_one_line_and_keeps_the_former_checkpoint(saved, monkeypatch):
    checkpoints = Checkpoints(saved)

    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for handler in (ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler):
        monkeypatch.setattr(handler, "async_save", disk_full)
    with pytest.raises(UserError) as error:
        checkpoints.save(3, make_state(3), {}, wait=True)
    checkpoints.close()
    text = str(error.value)
    assert "disk full" in text and "earlier checkpoint 2 is intact" in text and "\n" not in text
    monkeypatch.undo()
    again = Checkpoints(saved)
    assert_equal_bits(again.restore(None, abstract(make_state()))[0], make_state(2))
    again.save(3, make_state(3), {})
    again.close()
    assert again.all_steps() == [2, 3]
