"""A study of MNIST in small: a few steps of its members, on scikit-learn's digits, in this process."""

from types import SimpleNamespace

from cluster import reproduce
from data.shards import pack
from data.sources import open_source

SMALL = ("data.source=digits", "training.steps=3", "training.log_every=1")
BOARD = SimpleNamespace(count=SimpleNamespace(remote=lambda *arguments: None))


def ran(study, labels, out, overrides=SMALL):
    """The study's outcomes and table, of its prerequisites and some members."""
    members = [member for member in study.members if member.label in labels]
    recipes = {each.label: reproduce._recipe(each, SMALL, str(out)) for each in study.prerequisites}
    recipes |= {each.label: reproduce._recipe(each, overrides, str(out)) for each in members}
    packs = {
        label: pack(open_source("digits", recipe.data.options), f"{out}/shards-{number}", rows_per_block=500)
        for number, (label, recipe) in enumerate(recipes.items())
    }

    def run(member):
        document = recipes[member.label].model_dump(mode="json")
        reproduce._run_one(study, member, document, packs[member.label].base, 0, str(out), BOARD, False)
        return [reproduce._outcome(reproduce.member_folder(str(out), member.label, 0), 0)]

    for member in study.prerequisites:
        run(member)
    recipes |= {each.label: reproduce._recipe(each, overrides, str(out)) for each in members}  # what they are built on
    study.prepare(str(out), {member.label: packs[member.label] for member in members}, lambda text: None)
    outcomes = {member.label: run(member) for member in members}
    return outcomes, reproduce.study_table(study, members, outcomes)
