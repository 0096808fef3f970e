"""Recipes: every shipped one is valid, and every fault is one line that names the remedy."""

import pytest

from cluster.recipe import Recipe, load_recipe, shipped_recipes
from data.errors import UserError


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_described(name):
    recipe = load_recipe(name)
    assert recipe.summary
    assert load_recipe(name).fingerprint() == recipe.fingerprint()
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # as it reaches workers


def test_overrides_change_nested_fields():
    recipe = load_recipe(
        "digits", ["training.steps=7", "training.optimiser.learning_rate=0.5", "hierarchy=null", "scaling.workers=1"]
    )
    assert recipe.training.steps == 7
    assert recipe.training.optimiser.learning_rate == 0.5
    assert recipe.hierarchy is None
    assert recipe.fingerprint() != load_recipe("digits").fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        *("tracking.uri=sqlite:///a.db", "evaluation.n_samples=1999", "scaling.max_failures=9", "training.log_every=3"),
        *("training.engine=deepspeed", "hierarchy.cpus_per_task=2", "training.checkpoint_every=3"),
    ],
)
def test_what_does_not_decide_the_model_does_not_end_an_unfinished_job(override):
    assert load_recipe("digits", [override]).fingerprint() == load_recipe("digits").fingerprint()


@pytest.mark.parametrize(
    "override", ["training.seed=1", "training.steps=301", "model.n_factors=5", "hierarchy.steps=1", "training.lanes=4"]
)
def test_what_decides_the_model_does(override):
    assert load_recipe("digits", [override]).fingerprint() != load_recipe("digits").fingerprint()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trainig.steps=5"], ["unknown field 'trainig'", "did you mean 'training'"]),
        (["training.stepz=5"], ["unknown field 'training.stepz'", "did you mean 'steps'"]),
        (["hierarchy.optimiser.lr=5"], ["unknown field 'hierarchy.optimiser.lr'", "learning_rate"]),
        (["training.steps=many"], ["training.steps", "valid integer", "'many'"]),
        (["training.engine=horovod"], ["training.engine", "'ddp' or 'deepspeed'"]),
        (["training.steps=-1", "model.noise_floor=0"], ["training.steps", "model.noise_floor"]),
        (["training.batch_size=255"], ["batch_size (255)", "multiple", "workers (2)"]),
        (["evaluation.significance=0.05"], ["z_threshold or significance, not both"]),
        (["scaling.workers=100000", "scaling.min_workers=1"], ["no batch", "1 to 100000", "raise min_workers"]),
        (["scaling.workers=1000000000000"], ["scaling.workers", "100000"]),
        (["scaling.timeout_seconds=99999999999999999999"], ["scaling.timeout_seconds"]),
        (["training.steps"], ["write --set training.steps=500"]),
        (["name.x=1"], ["'name' is a value"]),
        (["training.steps=[1"], ["not valid YAML"]),
        (["training.steps=2020-99-99"], ["not valid YAML", "month"]),
        (["training.steps=!!timestamp x"], ["not valid YAML"]),
        (["training.steps=" + "9" * 5000], ["not valid YAML"]),
        (["training.steps=" + "[" * 5000], ["nested too deeply"]),
        (["training.steps=&a [*a]"], ["aliases"]),
        (["data=null"], ["data"]),
        (["registry.alias=v1"], ["registry.alias", "choose another"]),
        (["registry.alias=Latest"], ["registry.alias", "choose another"]),
        (["training.seed=4294967296"], ["training.seed", "less than or equal to 4294967295"]),
        (["evaluation.seed=4294967296", "data.options.seed=4294967296"], ["evaluation.seed", "data.options.seed"]),
        (["evaluation.n_samples=100000000000"], ["evaluation.n_samples", "100000000"]),
    ],
)
def test_faults_are_one_line(overrides, parts):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- 1\n", "not a mapping"),
        ("a: [1\n", "cannot be read as YAML"),
        ("data: {source: digits}\n", "'name' is missing"),
        ("a: " + "[" * 20_000, "nested too deeply"),
        ("a: &a [1]\nb: [*a]\n", "aliases"),
        ("#" * 1_000_001, "1,000,000 bytes"),
    ],
)
def test_recipe_files(tmp_path, text, part):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_recipe("digit")
    for name in ("a" * 5000, "a\0b", ""):
        with pytest.raises(UserError, match="unknown recipe"):
            load_recipe(name)
