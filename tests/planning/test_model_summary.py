import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from cxrjax.cli.main import main
from cxrjax.errors import CxrError
from cxrjax.models import abstract, create
from cxrjax.models.network import Network, parameter_count
from cxrjax.planning.model_summary import detail_table, multiply_adds, overview_table, summarize_model, summarize_models

PUBLISHED = {  # parameters at 1000 classes, as torchvision and timm state them
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "hrnet_w18": 21_299_004,
    "hrnet_w32": 41_232_680,
    "hrnet_w48": 77_469_864,
}


def test_parameter_counts_match_published_ones():
    assert {name: parameter_count(abstract(name, classes=1000)) for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("name", "counted", "published"),
    [
        # counted by torch.utils.flop_counter; the 1e9 that torchvision states
        ("resnet18", 1_814_073_344, 1.81),
        ("efficientnet_b0", 385_814_752, 0.39),
        ("densenet121", 2_834_161_664, 2.83),
    ],
)
def test_multiply_adds_match_published_ones(name, counted, published):
    # Our DenseNet pools before the 1x1 convolutions of its transitions, at a quarter of their cost.
    saved = 3 * (3 * 128 * 256 * 56**2) // 4 if name == "densenet121" else 0
    result = summarize_model(name, classes=1000).multiply_adds
    assert result == counted - saved
    assert round((result + saved) / 1e9, 2) == published


def test_multiply_adds_of_small_programs():
    images, matrix = jax.ShapeDtypeStruct((2, 8, 6, 4), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 10), jnp.float32)  # of two groups

    def convolution(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    def count(function, *arguments):
        return multiply_adds(jax.make_jaxpr(function)(*arguments).jaxpr)

    one = 2 * 4 * 3 * 10 * (3 * 3 * 2)
    assert count(convolution, images, kernel) == one
    assert count(jax.checkpoint(jax.jit(convolution)), images, kernel) == one
    assert count(lambda m: m @ m.T, matrix) == 5 * 5 * 7
    assert count(lambda m: jnp.einsum("ij,kj->ik", m, m).sum() * m, matrix) == 5 * 5 * 7
    looped = lambda m: jax.lax.scan(lambda carry, _: (carry + m @ m.T, None), jnp.zeros((5, 5)), length=4)  # noqa: E731
    assert count(looped, matrix) == 4 * 5 * 5 * 7
    either = lambda m: jax.lax.cond(m[0, 0] > 0, lambda: (m @ m.T).sum(), lambda: m.sum())  # noqa: E731
    assert count(either, matrix) == 5 * 5 * 7

    def platforms(m):
        return jax.lax.platform_dependent(m, tpu=lambda m: m @ m.T @ m, default=lambda m: m * (m @ m.T).sum())

    assert count(lambda m: platforms(m).sum(), matrix) == 5 * 5 * 7
    assert count(jax.grad(lambda m: platforms(m).sum()), matrix) == 3 * 5 * 5 * 7
    unused = jax.checkpoint(jax.jit(lambda m: (m + 1, m @ m.T)))
    assert count(lambda m: unused(m)[0], matrix) == 0
    assert count(lambda m: unused(m)[1] + (m[:1] @ m.T) * 0, matrix) == 5 * 5 * 7 + 5 * 7


def test_summary_matches_the_network():
    result = summarize_model("densenet_small", size=96, classes=3)
    network = Network.from_model(create("densenet_small", classes=3))
    features = network.model().features(np.zeros((1, 96, 96, 1), np.float32))
    assert [(maps.name, maps.height, maps.width, maps.channels) for maps in result.maps] == [
        (name, *maps.shape[1:]) for name, maps in features.items()
    ]
    assert [maps.stride for maps in result.maps] == [96 / maps.shape[1] for maps in features.values()]
    assert result.parameters == parameter_count(network)
    assert (result.size, result.classes, result.inputs) == (96, 3, network.input_spec)
    assert (result.maps[-1].receptive_field, result.maps[-1].whole) == (131, False)


def test_squeeze_and_excitation_reads_the_whole_image():
    result = summarize_model("efficientnet_small")
    assert [maps.whole for maps in result.maps[:1]] == [False]
    assert result.maps[-1].whole


def test_a_network_with_a_fixed_size_keeps_it():
    assert [summarize_model(name, size=96).size for name in ("sequential_cnn", "simple_cnn")] == [64, 96]


def test_bad_sizes_and_names_are_errors():
    with pytest.raises(CxrError, match="hrnet_small at 100 px: HRNet's branches do not fit"):
        summarize_models(["hrnet_small"], size=100)
    with pytest.raises(CxrError, match="densenet_small at 0 px: size must be a whole number above 0"):
        summarize_models(["densenet_small"], size=0)
    with pytest.raises(CxrError, match="did you mean 'densenet121'"):
        summarize_models(["densenet12"])


def test_the_command_lists_all_or_details_some(capsys, tmp_path):
    small = ["densenet_small", "efficientnet_small", "sequential_cnn"]
    assert main(["models", *small, "--size", "64", "--json", str(tmp_path / "models.json")]) == 0
    out, _ = capsys.readouterr()
    assert "11,822 parameters at 14 findings" in " ".join(out.split())
    assert "+ whole image" in out
    listed = json.loads((tmp_path / "models.json").read_text())
    assert [entry["name"] for entry in listed] == small
    assert listed[0] == json.loads(json.dumps(summarize_model("densenet_small", size=64).as_dict()))
    assert main(["models", "hrnet_smal"]) == 1
    assert "did you mean 'hrnet_small'" in " ".join(capsys.readouterr().err.split())


def test_the_overview_has_a_line_for_each():
    listed = summarize_models(["densenet_small", "efficientnet_small", "simple_cnn"], size=64)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(overview_table(listed), detail_table(listed[0]))
    text = capture.get()
    for entry in listed:
        line = next(line for line in text.splitlines() if line.strip().startswith(entry.name))
        assert f"{entry.parameters:,}" in line
        assert ("whole image" in line) == entry.maps[-1].whole
