import pytest

from gemmule.fields import settings_of
from gemmule.train.recipe import Recipe
from runs import gemmule


def test_every_setting_is_listed_with_its_values_default_and_meaning() -> None:
    ended = gemmule("settings")
    assert ended.code == 0
    for setting in settings_of(Recipe):
        assert f"{setting.key}   {setting.kind}; " in ended.out
        assert setting.meaning in ended.out
    assert "train.steps   a whole number from 1 to 1,000,000,000; required\n" in ended.out
    assert "train.minutes   a number above 0, or none; default: none\n" in ended.out


@pytest.mark.parametrize("key", ["train", "model.num", "optimizer.learning_rate"])
def test_a_section_or_the_beginning_of_a_key_is_enough(key: str) -> None:
    shown = [line.split()[0] for line in gemmule("settings", key).out.splitlines()[::2]]
    assert shown == [setting.key for setting in settings_of(Recipe) if setting.key.startswith(key)]


def test_a_name_of_other_programs_leads_to_ours() -> None:
    ended = gemmule("settings", "lr")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "gemmule: lr: no such setting; did you mean optimizer.learning_rate?\n"
