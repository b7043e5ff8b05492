"""The runner's settings, and the values that a run was asked for."""

from vitkit.runs.settings import FREE, ONE_WAY, SETTINGS, requested


def test_every_setting_has_a_help_text_and_a_default_of_its_type():
    assert {*FREE, *ONE_WAY} <= set(SETTINGS)
    for name, setting in SETTINGS.items():
        assert setting.help, name
        assert (setting.annotation is bool) == (name in ONE_WAY), name


def test_requested_values_are_those_before_anything_was_resolved():
    summary = {"requested": {"precision": "auto", "lr": None}, "settings": {"precision": "bf16"}, "arguments": {"lr": 0.1}}
    assert requested(summary) == {"precision": "auto", "lr": None}


def test_an_older_summary_gives_its_arguments_and_resolved_settings():
    summary = {"arguments": {"lr": 0.1}, "settings": {"seed": 3, "precision": "fp32", "grad_accum": 2, "device": "cpu", "threads": 8}}
    assert requested(summary) == {"lr": 0.1, "seed": 3, "precision": "fp32", "grad_accum": 2}
    assert requested({}) == {}
