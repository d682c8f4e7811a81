"""FLOPs of a program, loops and platforms included."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from common.nn.layers.deform_conv import deform_conv2d
from common.training.pod.flops import count


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_products_count_two_a_term():
    assert count(lambda a, b: a @ b + 1, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    batched = lambda a, b: jnp.einsum("bij,bkj->bik", a, b)  # noqa: E731
    assert count(batched, array(4, 3, 5), array(4, 7, 5)) == 2 * 4 * 3 * 7 * 5


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_each_gradient_of_a_convolution_counts_as_much_as_the_convolution(stride, groups):
    x, kernel = array(2, 16, 16, 8), array(3, 3, 8 // groups, 12)
    expected = 2 * (2 * (16 // stride) ** 2 * 12) * (9 * 8 // groups)

    def gradients(x, kernel):
        output, transpose = jax.vjp(lambda *a: conv(*a, stride, groups), x, kernel)
        return transpose(output)

    assert count(lambda *a: conv(*a, stride, groups), x, kernel) == expected
    assert count(gradients, x, kernel) == 3 * expected


def test_a_program_without_loops_counts_what_the_compiler_counts():
    def network(x, kernel, dense):
        return jnp.tanh(conv(x, kernel, 2)).reshape(2, -1) @ dense

    arguments = array(2, 64, 64, 64), array(1, 1, 64, 64), array(32 * 32 * 64, 10)
    compiled = jax.jit(network).lower(*arguments).compile()
    assert count(network, *arguments) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)


def test_loops_count_each_turn_and_recomputation_counts_again():
    def layers(x, kernels):
        return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0].sum()

    shapes = array(4, 8), array(5, 8, 8)
    one_pass = 5 * 2 * 4 * 8 * 8
    assert count(layers, *shapes) == one_pass
    assert count(jax.grad(layers, (0, 1)), *shapes) == 3 * one_pass
    product = lambda x, kernel: jnp.sin(jnp.tanh(x @ kernel)).sum()  # noqa: E731
    one_pass = 2 * 4 * 8 * 8
    shapes = array(4, 8), array(8, 8)
    assert count(jax.value_and_grad(jax.checkpoint(product), (0, 1)), *shapes) == 4 * one_pass


def test_the_branch_of_the_platform_counts_else_the_dearest():
    def by_platform(x):
        return lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    product = 2 * 8**3
    assert count(by_platform, array(8, 8)) == product
    assert count(by_platform, array(8, 8), platform="cpu") == 2 * product

    def by_data(x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

    assert count(by_data, array(8, 8)) == 2 * product


def test_a_deformable_convolution_counts_all_its_taps():
    shapes = array(2, 8, 8, 16), array(2, 8, 8, 18), array(3, 3, 16, 16)
    found = count(lambda x, offsets, kernel: deform_conv2d(x, offsets, kernel, padding=1), *shapes)
    assert found == 2 * (2 * 8 * 8) * 9 * 16 * 16


def test_what_no_result_depends_on_does_not_count():
    @jax.jit
    def two_products(x):
        return x @ x, x @ x @ x

    assert count(lambda x: two_products(x)[0], array(8, 8)) == 2 * 8**3
    # The value of a function that only its gradient is asked of.
    assert count(jax.grad(lambda x, y: (x @ y).sum()), array(8, 8), array(8, 8)) == 2 * 8**3
