"""Everything that a registered model can be asked, and what it refuses."""

import json
import subprocess
import sys
import textwrap

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from data.errors import UserError
from deploy.registry import register_model
from deploy.served_model import ServedModel
from deploy.sources import write_sources
from trainer.checkpoint import save_model
from trainer.models.autoencoder import Autoencoder
from trainer.models.classifier import Classifier
from trainer.tracking import mlflow_at, start_run


@pytest.fixture(scope="module")
def loaded(shelf):
    model = shelf.mixture()
    put = shelf.put(model, name="asked")
    with mlflow_at(shelf.uri):
        return model.eval(), mlflow.pyfunc.load_model(put.uri)


@pytest.fixture
def x():
    return np.random.default_rng(0).random((6, 64), np.float32)


def test_every_kind_of_input_gives_the_same(loaded, x):
    model, served = loaded
    expected = model.log_prob(torch.from_numpy(x)).detach().numpy()
    frame = pd.DataFrame(x.astype(np.float64), columns=[f"pixel {i}" for i in range(64)])
    for given in (x, x.astype(np.float64), x.reshape(6, 8, 8, 1), frame, x.tolist()):
        np.testing.assert_allclose(served.predict(given), expected, rtol=1e-6)
    for task, shape in (("log_prob", ()), ("responsibilities", (10,)), ("encode", (6,)), ("inpaint", (8, 8, 1))):
        for n in (0, 1, 2, 1000):
            for given in (np.full((n, 64), 0.5), pd.DataFrame(np.full((n, 64), 0.5))):
                assert served.predict(given, params={"task": task}).shape == (n, *shape)
    assert served.metadata.signature.inputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 64)}
    assert served.input_example.shape == (2, 64)


def test_samples_and_draws_are_fixed_by_the_seed(loaded, x):
    _, served = loaded
    hidden = np.where(np.arange(64) < 30, np.nan, x)
    for params in ({"task": "sample", "n": 4}, {"task": "inpaint", "mode": "sample", "n": 4, "noise": True}):
        first, again, other = (served.predict(hidden, params={**params, "seed": seed}) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        assert served.predict(hidden, params={**params, "n": 0}).size == 0
    draws = served.predict(hidden, params={"task": "inpaint", "mode": "sample", "n": 3})
    assert draws.shape == (6, 3, 8, 8, 1)
    np.testing.assert_array_equal(draws.reshape(6, 3, 64)[:, :, 30:], np.repeat(x[:, None, 30:], 3, 1))


def test_inpainting_by_nan_and_by_mask_is_that_of_the_model(loaded, x):
    model, served = loaded
    mask = np.arange(64) >= 30
    hidden = np.where(mask, x, np.nan).astype(np.float32)
    for mode in ("map", "mean"):
        with torch.no_grad():
            expected = model.inpaint(torch.from_numpy(x), torch.from_numpy(mask), mode=mode).numpy()
        by_nan = served.predict(hidden, params={"task": "inpaint", "mode": mode})
        by_mask = served.predict(x, params={"task": "inpaint", "mode": mode, "mask": mask.tolist()})
        per_row = np.broadcast_to(mask, x.shape).reshape(-1).tolist()
        by_rows = served.predict(x, params={"task": "inpaint", "mode": mode, "mask": per_row})
        for found in (by_nan, by_mask, by_rows):
            np.testing.assert_allclose(found.reshape(6, 64), expected, atol=1e-6)


def test_codes_hold_the_component_and_its_latent_means(loaded, x):
    model, served = loaded
    codes = served.predict(x, params={"task": "encode"})
    # Dense float64: E[z | x, k] = Aᵀ (A Aᵀ + D)⁻¹ (x - μ).
    for row, (k, *z) in zip(x.astype(np.float64), codes):
        loadings = model.factor_loadings[int(k)].detach().double().numpy()
        noise = model.noise_variance[int(k)].detach().double().numpy()
        centred = row - model.means[int(k)].detach().double().numpy()
        expected = loadings.T @ np.linalg.solve(loadings @ loadings.T + np.diag(noise), centred)
        np.testing.assert_allclose(z, expected, atol=1e-4)
    responsibilities = served.predict(x, params={"task": "responsibilities"})
    np.testing.assert_array_equal(codes[:, 0], responsibilities.argmax(1))
    rebuilt = served.predict(codes, params={"task": "decode"})
    expected = model.reconstruct(torch.from_numpy(x)).detach().numpy().reshape(6, 8, 8, 1)
    np.testing.assert_allclose(rebuilt, expected, atol=1e-6)
    np.testing.assert_array_equal(served.predict(pd.DataFrame(codes), params={"task": "decode"}), rebuilt)


def test_what_it_cannot_do_is_refused(loaded, x):
    _, served = loaded
    codes = np.zeros((1, 6))
    refused = [
        (x, {"task": "features"}, "can do log_prob, responsibilities, encode, sample, inpaint, decode"),
        (np.where(x > 0.5, np.nan, x), {}, "NaN"),
        (np.full_like(x, np.inf), {"task": "inpaint"}, "infinite"),
        (x[:, :63], {}, "shape"),
        (x, {"task": "inpaint", "mode": "best"}, "map, mean, sample"),
        (x, {"task": "inpaint", "mask": [True]}, "mask has 1"),
        (x, {"task": "sample", "n": -1}, "negative"),
        (codes[:, :5], {"task": "decode"}, "columns"),
        (codes + 10, {"task": "decode"}, "component, 0 to 9"),
        (codes + 0.5, {"task": "decode"}, "component, 0 to 9"),
    ]
    for given, params, message in refused:
        with pytest.raises(ValueError, match=message):
            served.predict(given, params=params)


CONSUMER = """
    import sys

    class Absent:
        names = {"cluster", "trainer", "data", "eval", "deploy", "safetensors", "ray", "scipy"}
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in self.names:
                raise ImportError(name + " is not on this machine")

    sys.meta_path.insert(0, Absent())
    import json, shutil, mlflow, numpy as np
    mlflow.set_tracking_uri(sys.argv[1])
    out = {}
    for name in sys.argv[3:]:
        model = mlflow.pyfunc.load_model(f"models:/{name}@candidate", dst_path=f"{sys.argv[2]}/{name}")
        shutil.rmtree(f"{sys.argv[2]}/{name}")    # whatever it imports later is in memory
        x = np.full((3, 64), 0.5)
        for task in model.unwrap_python_model().tasks:
            given = np.zeros((3, 6)) if task == "decode" else x
            out[f"{name} {task}"] = list(model.predict(given, params={"task": task}).shape)
    out["modules"] = sorted(Absent.names & set(sys.modules))
    print(json.dumps(out))
"""


def test_many_codes_are_decoded_in_batches(monkeypatch):
    torch.manual_seed(0)
    coder = Autoencoder([8, 8, 1], 2, {"kind": "square"}, 8, width=4, bounded=True)
    sizes, decode = [], coder.decode
    monkeypatch.setattr(coder, "decode", lambda z: sizes.append(len(z)) or decode(z))
    served = ServedModel()
    served.net, served.shape = coder.eval(), (8, 8, 1)
    codes = np.random.default_rng(0).random((2500, 2), np.float32)
    with torch.inference_mode():
        found, last = served._decode(codes), decode(torch.from_numpy(codes[-9:]))
    assert sizes == [1024, 1024, 452]
    np.testing.assert_allclose(found[-9:].reshape(9, 64), last.numpy(), atol=1e-6)


def test_a_consumer_without_manymodes_asks_everything(shelf, digits_pack, tmp_path):
    shelf.put(shelf.mixture(), name="mixture")
    network = Classifier([8, 8, 1], 10, 8, 16)
    save_model(str(tmp_path / "network"), network, "classifier", digits_pack, dequantised=False)
    run = start_run(shelf.uri, "shelf", "run", params={}, tags={})
    options = {"alias": "candidate", "tracking_uri": shelf.uri, "run_id": run, "scores": {}}
    register_model(str(tmp_path / "network"), name="classifier", **options)
    prior = {"kind": "mixture", "size": 2}  # whose numbers travel with the weights
    coder = Autoencoder([8, 8, 1], 6, prior, 8, width=4, bounded=True, precision="bfloat16")
    save_model(str(tmp_path / "coder"), coder, "autoencoder", digits_pack, dequantised=False)
    register_model(str(tmp_path / "coder"), name="autoencoder", **options)
    elsewhere = tmp_path / "elsewhere"
    for name in ("mixture", "classifier", "autoencoder"):
        (elsewhere / name).mkdir(parents=True)
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(CONSUMER),
            shelf.uri,
            str(elsewhere),
            "mixture",
            "classifier",
            "autoencoder",
        ],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(found.stdout.strip().splitlines()[-1]) == {
        "mixture log_prob": [3],
        "mixture responsibilities": [3, 10],
        "mixture sample": [1, 8, 8, 1],
        "mixture inpaint": [3, 8, 8, 1],
        "mixture encode": [3, 6],
        "mixture decode": [3, 8, 8, 1],
        "classifier probabilities": [3, 10],
        "classifier features": [3, 16],
        "autoencoder encode": [3, 6],
        "autoencoder sample": [1, 8, 8, 1],
        "autoencoder decode": [3, 8, 8, 1],
        "modules": [],
    }


def test_sources_of_a_family_are_a_package_anywhere(tmp_path):
    write_sources("mfa", tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.py")) == ["inpainting.py", "mfa.py"]
    assert not any("trainer" in line for file in tmp_path.glob("*.py") for line in file.read_text().splitlines()
                   if line.lstrip().startswith(("import ", "from ")))  # fmt: skip
    with pytest.raises(UserError, match="unknown model family 'nothing'"):
        write_sources("nothing", tmp_path)
