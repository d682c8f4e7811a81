"""Trunks beside ResNet and EfficientNet: taps, freezing, norms, and equality with timm."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.errors import InvalidRngError

from common.io.errors import UserError
from common.nn.backbones import hrnet, make_backbone, nasnet, preprocessing, resnet, senet
from common.nn.weights.backbone_weights import (
    backbone_shapes,
    load_backbone_weights,
    save_backbone_weights,
)
from tests.oracles.timm_backbones import (
    assert_equals,
    assert_equals_timm,
    import_timm,
    timm_hrnet_stages,
)
from tests.oracles.variables import random_variables

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
SHALLOW = (1, 1, 1, 1)
# Networks of each family, small enough to be differentiated.
TINY = {
    "resnext50_32x4d": resnet.Layout(SHALLOW, groups=2, base_width=16, width=16),
    "seresnet50": senet.Layout(SHALLOW, senet.SEBottleneckBlock, senet.SEStem, width=16),
    "senet154": senet.Layout(SHALLOW, senet.SENetBlock, senet.SENetStem, groups=4, width=16),
    "hrnet_w18": hrnet.Layout(4, (1, 1, 1), 1),
    "nasnet_mobile": nasnet.Layout(8, 1, 8, False),
}
CHANNELS = {
    "resnext50_32x4d": (64, 128, 256, 512),
    "seresnet50": (64, 128, 256, 512),
    "senet154": (64, 128, 256, 512),
    "hrnet_w18": (4, 8, 16, 32),
    "nasnet_mobile": (8, 48, 96, 192),
}


def tiny(name, **fields):
    return make_backbone(name, layout=TINY[name], **fields)


def shapes(module, size=(64, 96), train=False):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.eval_shape(
        lambda x: module.init_with_output(rngs, x, train),
        jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),
    )


@pytest.mark.parametrize("name", TINY)
def test_taps_have_strides_4_to_32_with_every_norm(name):
    trees = {}
    for norm in ("sync", "group"):
        module = tiny(name, norm=norm, remat=norm == "group", dtype=jnp.bfloat16)
        taps, variables = shapes(module, train=norm == "sync")
        trees[norm] = jax.tree.structure(variables["params"])
        assert ("batch_stats" in variables) == (norm != "group")
        assert [taps[tap].shape for tap in ("c2", "c3", "c4", "c5")] == [
            (1, 64 // stride, 96 // stride, channels)
            for stride, channels in zip((4, 8, 16, 32), CHANNELS[name], strict=True)
        ]
        assert all(tap.dtype == jnp.bfloat16 for tap in taps.values())
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert trees["sync"] == trees["group"]


@pytest.mark.parametrize("name", ["hrnet_w18", "nasnet_mobile"])
def test_odd_images_are_covered_by_every_level(name):
    taps, _ = shapes(tiny(name), size=(101, 67))
    for finer, coarser in zip(("c2", "c3", "c4"), ("c3", "c4", "c5"), strict=True):
        assert all(
            c == -(-f // 2)
            for f, c in zip(taps[finer].shape[1:3], taps[coarser].shape[1:3], strict=True)
        )


def constant_paths(module, variables):
    """Paths of the parameters that get no gradient, and of the statistics that do not change.

    Read from the traced program, without compiling it: there the one are a constant 0 and the
    others the program's own inputs.
    """

    def updates(variables):
        def loss(params):
            taps, updated = module.apply(
                {**variables, "params": params}, IMAGES, True, mutable=["batch_stats"]
            )
            return sum(jnp.sum(tap) for tap in taps.values()), updated["batch_stats"]

        return jax.grad(loss, has_aux=True)(variables["params"])

    jaxpr, outputs = jax.make_jaxpr(updates, return_shape=True)(variables)
    makers = {out: equation for equation in jaxpr.eqns for out in equation.outvars}

    def is_constant(var):
        if var not in makers:
            return True
        inputs = makers[var].invars
        return makers[var].primitive.name == "broadcast_in_dim" and hasattr(inputs[0], "val")

    constant = jax.tree.unflatten(
        jax.tree.structure(outputs), map(is_constant, jaxpr.jaxpr.outvars)
    )
    return [traverse_util.flatten_dict(tree, sep="/") for tree in constant]


@pytest.mark.parametrize("name", TINY)
def test_what_the_pattern_names_and_nothing_else_is_frozen(name):
    module = tiny(name, norm="sync", frozen_stages=2, remat=not name.startswith("nasnet"))
    gradients, statistics = constant_paths(module, random_variables(module))
    frozen_layers = set()
    for path, constant in gradients.items():
        assert constant == (re.fullmatch(module.frozen_pattern(), path) is not None), path
        if constant:
            frozen_layers.add(path.rpartition("/")[0])
    assert any(gradients.values()) and not all(gradients.values())
    for path, constant in statistics.items():
        assert constant == (path.rpartition("/")[0] in frozen_layers), path


def test_stages_can_run_one_after_the_other():
    whole_taps, whole = shapes(tiny("resnext50_32x4d"))
    first = tiny("resnext50_32x4d", last_stage=2)
    first_taps, first_variables = shapes(first)
    second = tiny("resnext50_32x4d", first_stage=3)
    second_taps, second_variables = jax.eval_shape(
        lambda x: second.init_with_output(jax.random.key(0), x, False), first_taps["c3"]
    )
    assert first_taps | second_taps == whole_taps
    for collection, tree in whole.items():
        assert first_variables[collection] | second_variables[collection] == tree
        assert not set(first_variables[collection]) & set(second_variables[collection])


@pytest.mark.parametrize(
    "name",
    [
        "senet154",
        pytest.param("resnext50_32x4d", marks=pytest.mark.slow),
        pytest.param("seresnet50", marks=pytest.mark.slow),
    ],
)
def test_deformable_stages_start_as_ordinary_ones_and_take_their_weights(name, tmp_path):
    plain = random_variables(tiny(name))
    path = tmp_path / "x.safetensors"
    save_backbone_weights(path, traverse_util.flatten_dict(plain, sep="/"), name, "")
    module = tiny(name, deform=(0, 1, 2))
    start = random_variables(module)
    start = traverse_util.path_aware_map(
        lambda path, leaf: 0 * leaf if "offset" in path else leaf, start
    )
    variables, report = load_backbone_weights(path, start)
    blocks = [f"params/stage{stage}/block0/conv2/offset" for stage in (3, 4)]
    assert sorted(report.missing) == [f"{b}/{leaf}" for b in blocks for leaf in ("bias", "kernel")]
    found = jax.jit(lambda v: module.apply(v, IMAGES[:1], False))(variables)
    expected = jax.jit(lambda v: tiny(name).apply(v, IMAGES[:1], False))(plain)
    for tap in ("c2", "c3", "c4"):
        np.testing.assert_allclose(found[tap], expected[tap], atol=1e-4 * expected[tap].max())
    assert not np.allclose(found["c5"], expected["c5"], rtol=1e-2)  # version 2 starts halved


def test_exchange_by_bilinear_interpolation_has_half_pixel_centres():
    x = jnp.arange(4.0).reshape(1, 1, 4, 1)
    smooth = hrnet.upsample(x, (2, 8), 2, "bilinear")[0, 0, :, 0]
    np.testing.assert_allclose(smooth, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)
    nearest = hrnet.upsample(x, (2, 7), 2, "nearest")[0, 0, :, 0]
    np.testing.assert_array_equal(nearest, [0, 0, 1, 1, 2, 2, 3])


def test_what_a_network_has_not_is_refused():
    with pytest.raises(UserError, match="drop_path_rate: hrnet_w18"):
        make_backbone("hrnet_w18", drop_path_rate=0.2)
    with pytest.raises(UserError, match="deform: nasnet_mobile"):
        make_backbone("nasnet_mobile", deform=(0, 1, 1))
    with pytest.raises(UserError, match="deform: found .*basic blocks"):
        shapes(make_backbone("resnet18", deform=(0, 0, 1)))
    with pytest.raises(UserError, match="upsampling: found 'cubic', expected one of nearest"):
        shapes(tiny("hrnet_w18", upsampling="cubic"))
    assert preprocessing("nasnet_large") == ((127.5,) * 3, (127.5,) * 3)


def test_nasnet_drops_operations_in_training_only():
    module = tiny("nasnet_mobile", norm="frozen", drop_path_rate=0.5)
    _, variables = shapes(module)

    def run(train, **options):
        return jax.eval_shape(lambda v: module.apply(v, IMAGES, train, **options), variables)

    assert run(False)["c5"].shape == (2, 2, 3, 192)
    assert run(True, rngs={"dropout": jax.random.key(0)})["c5"].shape == (2, 2, 3, 192)
    with pytest.raises(InvalidRngError):
        run(True)


# ------------------------------------------------------------------------------------------------
# timm
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "timm_name", "size"),
    [
        ("resnext50_32x4d", "resnext50_32x4d", (64, 64)),
        ("seresnet50", "legacy_seresnet50", (64, 64)),
        ("seresnext50_32x4d", "legacy_seresnext50_32x4d", (71, 90)),
        ("senet154", "legacy_senet154", (64, 64)),
    ],
)
def test_one_block_a_stage_equals_timm(name, timm_name, size):
    layout = (resnet.RESNETS | senet.SENETS)[name]
    layout = type(layout)(**{**vars(layout), "depths": SHALLOW})
    assert_equals_timm(name, timm_name, size, layout, layers=SHALLOW)


def test_one_module_a_stage_of_hrnet_equals_timm():
    assert_equals_timm(
        "hrnet_w18",
        "hrnet_w18",
        (64, 64),
        hrnet.Layout(18, (1, 1, 1), 1),
        feature_location="",
        **timm_hrnet_stages((18, 36, 72, 144)),
    )


@pytest.mark.parametrize(
    ("num_cells", "skip_reduction"),
    [
        (1, False),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_nasnet_equals_cells_of_timm(num_cells, skip_reduction):
    """timm's network has a fixed number of cells, so its cells are put together here."""
    _, torch = import_timm()
    from timm.models import nasnet as peers

    class Small(torch.nn.Module):
        def __init__(self, f=8):
            super().__init__()
            self.conv0 = torch.nn.Sequential()
            self.conv0.conv = torch.nn.Conv2d(3, 8, 3, 2, bias=False)
            self.conv0.bn = torch.nn.BatchNorm2d(8, eps=1e-3)
            self.cell_stem_0 = peers.CellStem0(8, f // 4, "same")
            self.cell_stem_1 = peers.CellStem1(8, f // 2, "same")
            stage_input, before, number = 2 * f, f, 0
            for stage, reduction in enumerate((peers.ReductionCell0, peers.ReductionCell1, None)):
                g = f * 2**stage
                first = peers.FirstCell(before, g // 2, stage_input, g, "same")
                self.add_module(f"cell_{number}", first)
                previous = stage_input
                for i in range(1, num_cells):
                    cell = peers.NormalCell(previous, g, 6 * g, g, "same")
                    self.add_module(f"cell_{number + i}", cell)
                    previous = 6 * g
                number += num_cells
                if reduction:
                    cell = reduction(previous, 2 * g, 6 * g, 2 * g, "same")
                    self.add_module(f"reduction_cell_{stage}", cell)
                    stage_input = 8 * g
                    before = previous if skip_reduction else 6 * g

        def forward(self, x):
            stem = self.conv0(x)
            before, x = stem, self.cell_stem_0(stem)
            taps = [x]
            before, x = x, self.cell_stem_1(stem, x)
            for stage in range(3):
                for i in range(stage * num_cells, (stage + 1) * num_cells):
                    before, x = x, getattr(self, f"cell_{i}")(x, before)
                taps.append(x)
                if stage < 2:
                    reduced = getattr(self, f"reduction_cell_{stage}")(x, before)
                    before, x = (before if skip_reduction else x), reduced
            return [torch.relu(tap) for tap in taps]

    torch.manual_seed(0)
    layout = nasnet.Layout(8, num_cells, 8, skip_reduction)
    assert_equals("nasnet_mobile", Small(), (64, 80), layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "timm_name", "size", "options"),
    [
        ("resnext50_32x4d", "resnext50_32x4d", (97, 131), {}),
        ("resnext101_32x8d", "resnext101_32x8d", (96, 128), {}),
        ("resnext101_64x4d", "resnext101_64x4d", (96, 128), {}),
        ("seresnet50", "legacy_seresnet50", (97, 131), {}),
        ("seresnet101", "legacy_seresnet101", (96, 128), {}),
        ("seresnet152", "legacy_seresnet152", (96, 128), {}),
        ("seresnext50_32x4d", "legacy_seresnext50_32x4d", (97, 131), {}),
        ("seresnext101_32x4d", "legacy_seresnext101_32x4d", (96, 128), {}),
        ("senet154", "legacy_senet154", (97, 131), {}),
        ("hrnet_w18", "hrnet_w18", (96, 128), {"feature_location": ""}),
        ("hrnet_w32", "hrnet_w32", (96, 128), {"feature_location": ""}),
        ("hrnet_w48", "hrnet_w48", (96, 128), {"feature_location": ""}),
        ("nasnet_large", "nasnetalarge", (97, 131), {}),
    ],
)
def test_equals_timm(name, timm_name, size, options):
    assert_equals_timm(name, timm_name, size, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("nasnet_mobile", 5_289_978 - 1057 * 1000),  # the models repository's, less its classifier
        ("resnext152_32x8d", 120_323_392),  # of timm's ResNet class in that layout
    ],
)
def test_networks_that_timm_lacks_have_their_number_of_parameters(name, published):
    sizes = backbone_shapes(name)
    assert sum(np.prod(v) for k, v in sizes.items() if k.startswith("params/")) == published
