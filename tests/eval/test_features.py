"""Feature extractors: each kind gives the numbers of its network, and every misuse is one line."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data.errors import UserError
from eval.features import open_extractor
from eval.inception import InceptionV3, inception_from, normalised

RNG = np.random.default_rng(0)
COLOUR = RNG.random((7, 9, 8, 3), dtype=np.float32)
GREY = RNG.random((7, 8, 8), dtype=np.float32)
VECTORS = RNG.normal(size=(600, 5)).astype(np.float32) * 10


class Network(nn.Module):
    """Features that tell channels, rows and columns apart, and logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

    def forward(self, x):
        features = self.conv(x).mean((2, 3))
        return features, self.head(features)


def scripted(tmp_path, network, name="f.pt"):
    torch.jit.script(network).save(str(tmp_path / name))
    return str(tmp_path / name)


def refused(action, *parts):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_pixels():
    extractor = open_extractor("pixels")
    assert (extractor.name, extractor.spec, extractor.fingerprint) == ("pixels", "pixels", "pixels")
    found = extractor(COLOUR * 255)
    assert np.array_equal(found.x, COLOUR.reshape(7, -1) * 255)
    assert found.probabilities is None
    assert extractor.n_features == 216


def test_torchscript_images(tmp_path):
    network = Network()
    path = scripted(tmp_path, network)
    extractor = open_extractor(f"torchscript:{path}")
    found = extractor(COLOUR)
    with torch.no_grad():
        features, logits = network(torch.from_numpy(COLOUR).permute(0, 3, 1, 2))
    assert np.allclose(found.x, features.numpy(), atol=1e-6)
    assert np.allclose(found.probabilities, logits.softmax(1).numpy(), atol=1e-6)
    assert extractor.name == "torchscript:f.pt"
    assert extractor.fingerprint == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert extractor.n_features == 4


def test_torchscript_vectors_in_batches_and_frozen(tmp_path):
    network = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).eval()
    torch.jit.freeze(torch.jit.script(network)).save(str(tmp_path / "f.pt"))
    x = np.concatenate([VECTORS, VECTORS])  # more than a batch
    found = open_extractor(f"torchscript:{tmp_path}/f.pt")(x)
    assert np.allclose(found.x, network(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_another_process_opens_the_same_from_another_folder(tmp_path, monkeypatch):
    """By its spec, which a relative path does not break."""
    scripted(tmp_path, Network())
    monkeypatch.chdir(tmp_path)
    extractor = open_extractor("torchscript:f.pt")
    code = (
        "import sys, json, numpy as np; from eval.features import open_extractor; e = open_extractor(sys.argv[1]);"
        "x = np.random.default_rng(0).random((7, 9, 8, 3), dtype=np.float32);"
        "print(json.dumps([e.name, e.fingerprint, e(x).x.tolist()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, extractor.spec], cwd="/", capture_output=True, text=True, timeout=60, check=True
    )
    name, fingerprint, x = json.loads(done.stdout)
    assert (name, fingerprint) == (extractor.name, extractor.fingerprint)
    assert np.allclose(x, extractor(COLOUR).x, atol=1e-6)


def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weights = RNG.normal(size=(3, 4)).astype(np.float32)
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["features"]),
            helper.make_node("Neg", ["features"], ["logits"]),
        ],
        "f",
        [helper.make_tensor_value_info("x", number, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info(name, number, ["n", 4]) for name in ("features", "logits")],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(tmp_path / "f.onnx"))
    extractor = open_extractor(f"onnx:{tmp_path}/f.onnx")
    assert extractor.n_features == 4
    found = extractor(COLOUR)
    expected = COLOUR.mean((1, 2)) @ weights
    assert np.allclose(found.x, expected, atol=1e-5)
    shares = np.exp(-expected) / np.exp(-expected).sum(1, keepdims=True)
    assert np.allclose(found.probabilities, shares, atol=1e-5)
    refused(lambda: extractor(VECTORS), "onnx:f.onnx", "[5]")
    (tmp_path / "f.onnx").write_bytes((tmp_path / "f.onnx").read_bytes()[:-20])
    refused(lambda: open_extractor(f"onnx:{tmp_path}/f.onnx"), "f.onnx", "ONNX")


def test_onnx_names_its_extra(tmp_path, monkeypatch):
    (tmp_path / "f.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(lambda: open_extractor(f"onnx:{tmp_path}/f.onnx"), "manymodes[onnx]")


FILE = """
import numpy as np, torch
from pathlib import Path
Path(__file__).with_suffix(".ran").write_text("")
def features(x):
    assert isinstance(x, np.ndarray)
    return torch.from_numpy(x).flatten(1)[:, :2] * 3
def fails(x):
    raise KeyError("my fault")
def three(x):
    return x[:, 0], x, x
def flat(x):
    return x[:, 0]
def text(x):
    return ["a"] * len(x)
def nan(x):
    return x * np.nan
number = 3
"""


def test_module_file_and_package(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    extractor = open_extractor(f"module:{tmp_path}/mine.py:features")
    assert extractor.name == "module:mine.py:features"
    assert np.array_equal(extractor(VECTORS).x, VECTORS[:, :2] * 3)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "inner.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    packed = open_extractor("module:pack.inner:features")
    assert packed.name == "module:pack.inner:features"
    assert packed.fingerprint == extractor.fingerprint
    assert np.array_equal(open_extractor(packed.spec)(VECTORS).x, VECTORS[:, :2] * 3)


def test_a_pin_is_compared_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "pinned").mkdir()
    (tmp_path / "pinned" / "__init__.py").write_text(FILE)
    (tmp_path / "pinned" / "inner.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    digest = hashlib.sha256(FILE.encode()).hexdigest()
    for place in (f"{tmp_path}/mine.py", "pinned.inner"):
        refused(lambda place=place: open_extractor(f"module:{place}:features#sha256={'0' * 16}"), digest, "0" * 16)
    assert not list(tmp_path.rglob("*.ran"))
    assert open_extractor(f"module:{tmp_path}/mine.py:features#sha256={digest[:16].upper()}").fingerprint == digest
    refused(lambda: open_extractor(f"torchscript:f.pt#sha256={digest[:15]}"), "16 to 64")
    path = scripted(tmp_path, Network())
    refused(lambda: open_extractor(f"torchscript:{path}#sha256={digest}"), digest)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        *(("fails", ["KeyError", "my fault"]), ("three", ["3 things"]), ("flat", ["[512]", "[512, d]"])),
        *(("text", ["no array of numbers"]), ("nan", ["NaN"]), ("absent", ["no function 'absent'"])),
        ("number", ["no function 'number'"]),
    ],
)
def test_functions_that_do_not_keep_the_contract(tmp_path, function, parts):
    (tmp_path / "mine.py").write_text(FILE)
    refused(lambda: open_extractor(f"module:{tmp_path}/mine.py:{function}")(VECTORS[:512]), *parts)


def test_specs_that_name_nothing(tmp_path):
    for spec in ("", "pixel", "torchscript:", "nonsense:x", "pixels#sha256=" + "0" * 64):
        refused(lambda spec=spec: open_extractor(spec), "unknown feature extractor", "torchscript:FILE")
    for kind in ("torchscript", "inception", "onnx"):
        refused(lambda kind=kind: open_extractor(f"{kind}:{tmp_path}/none"), "none", "no such file")
        refused(lambda kind=kind: open_extractor(f"{kind}:https://x/f.pt"), "not a local folder")
    refused(lambda: open_extractor("module:json"), "NAME")
    refused(lambda: open_extractor("module:no_such_module.x:f"), "not found")
    refused(lambda: open_extractor("module:json.nothing:f"), "not found")
    (tmp_path / "broken.py").write_text("def f(:\n")
    refused(lambda: open_extractor(f"module:{tmp_path}/broken.py:f"), "broken.py", "SyntaxError")


def test_files_of_another_kind_or_damaged(tmp_path):
    path = Path(scripted(tmp_path, Network()))
    refused(lambda: open_extractor(f"inception:{path}")(COLOUR), "f.pt", "4 features instead of 2048")
    torch.save(Network().state_dict(), tmp_path / "weights.pth")
    refused(lambda: open_extractor(f"torchscript:{tmp_path}/weights.pth"), "TorchScript")
    refused(lambda: open_extractor(f"inception:{tmp_path}/weights.pth"), "Inception v3", "missing")
    torch.save(Network(), tmp_path / "pickle.pth")
    refused(lambda: open_extractor(f"inception:{tmp_path}/pickle.pth"), "not a file of weights")
    torch.save([1], tmp_path / "list.pth")
    refused(lambda: open_extractor(f"inception:{tmp_path}/list.pth"), "no state dict")
    for kind in ("torchscript", "inception"):
        for content in (b"", b"x" * 100, path.read_bytes()[:-300]):
            (tmp_path / "d.pt").write_bytes(content)
            refused(lambda kind=kind: open_extractor(f"{kind}:{tmp_path}/d.pt"), "d.pt")
    (tmp_path / "d.safetensors").write_bytes(b"x" * 100)
    refused(lambda: open_extractor(f"inception:{tmp_path}/d.safetensors"), "d.safetensors")


def test_samples_on_another_scale(tmp_path):
    extractor = open_extractor(f"torchscript:{scripted(tmp_path, Network())}")
    refused(lambda: extractor(COLOUR * 255), "torchscript:f.pt", "divide 8-bit images by 255")
    refused(lambda: extractor(COLOUR * 2 - 1), "[-1, 1]")
    refused(lambda: extractor(np.full_like(COLOUR, np.nan)), "NaN")
    refused(lambda: extractor(COLOUR[:0]), "no samples")
    refused(lambda: extractor(GREY), "[8, 8]")
    extractor(COLOUR * 1.2 - 0.1)


@pytest.fixture(scope="module")
def weights():
    """Random weights of Inception v3, such that activations stay of order one."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.state_dict()


def auxiliary():
    """The auxiliary head's entries, by name and shape."""
    shapes = {"conv0.conv.weight": (128, 768, 1, 1), "conv1.conv.weight": (768, 128, 5, 5), "fc.weight": (1000, 768)}
    shapes |= {f"conv0.bn.{name}": (128,) for name in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {f"conv1.bn.{name}": (768,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {f"AuxLogits.{name}": torch.zeros(shape) for name, shape in {**shapes, "fc.bias": (1000,)}.items()}


def test_inception_has_the_known_size_and_names(weights):
    whole = {**weights, **auxiliary()}
    learnt = {n: v for n, v in whole.items() if "running" not in n and "num_batches" not in n}
    assert sum(value.numel() for value in learnt.values()) == 27_161_264
    assert len([name for name in whole if name.endswith("conv.weight")]) == 96
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
        "Mixed_7a.branch7x7x3_4.bn.running_var": (192,),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1000, 2048),
    }.items():
        assert whole[name].shape == shape, name


def test_inception_from_files(weights, tmp_path):
    """With the auxiliary head, without batch counters, from .pth, .safetensors and TorchScript: one set of numbers."""
    without = {name: value for name, value in weights.items() if "num_batches" not in name}
    torch.save({**weights, **auxiliary()}, tmp_path / "a.pth")
    save_file(without, tmp_path / "b.safetensors")
    network = inception_from(weights)
    torch.jit.trace(network, torch.zeros(2, 3, 299, 299)).save(str(tmp_path / "c.pt"))
    with torch.no_grad():
        features, logits = network(normalised(torch.from_numpy(GREY[:2, None])))
    for name in ("a.pth", "b.safetensors", "c.pt"):
        extractor = open_extractor(f"inception:{tmp_path}/{name}")
        assert extractor.n_features == 2048
        found = extractor(GREY[:2, ..., None])
        assert np.allclose(found.x, features.numpy(), atol=1e-5)
        assert np.allclose(found.probabilities, logits.softmax(1).numpy(), atol=1e-5)
        assert found.probabilities.shape == (2, 1000)
    refused(lambda: extractor(VECTORS), "inception:c.pt", "[5]")
    torch.save({**weights, "fc.weight": torch.zeros(1008, 2048)}, tmp_path / "d.pth")
    refused(lambda: open_extractor(f"inception:{tmp_path}/d.pth"), "fc.weight", "[1008, 2048]")
    torch.save({**weights, "more": torch.zeros(1)}, tmp_path / "e.pth")
    refused(lambda: open_extractor(f"inception:{tmp_path}/e.pth"), "more is not in it")


def test_inception_resizes_as_pillow_does():
    """Bilinear with antialias, on an image that shrinks along one side and grows along the other."""
    from PIL import Image

    image = RNG.random((640, 64), dtype=np.float32)
    expected = np.asarray(Image.fromarray(image).resize((299, 299), Image.Resampling.BILINEAR))
    found = normalised(torch.from_numpy(image)[None, None])[0]
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        assert np.allclose(found[channel] * std + mean, expected, atol=1e-4)


def test_inception_equals_torchvision(weights):
    try:
        from torchvision.models import inception_v3
    except (ImportError, RuntimeError):  # the latter from a build for another torch
        pytest.skip("no torchvision that can be imported here")
    theirs = inception_v3(weights=None, init_weights=False, transform_input=True)
    assert {n for n in theirs.state_dict() if not n.startswith("AuxLogits")} == set(weights)
    theirs.load_state_dict(weights, strict=False)
    pooled = []
    theirs.eval().avgpool.register_forward_hook(lambda module, x, out: pooled.append(out.flatten(1)))
    x = normalised(torch.from_numpy(COLOUR[:3]).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = theirs(x)
        features, logits = inception_from(weights)(x)
    assert torch.allclose(features, pooled[0], atol=1e-5)
    assert torch.allclose(logits, expected, atol=1e-5)
