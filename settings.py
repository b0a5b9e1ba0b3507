"""Rules of the settings: flags that a run reads, flags that decide others, what goes together.

run.py has the settings themselves and the command line.
"""

from collections.abc import Mapping
from typing import Any

from data import DOWNLOADED
from federation import Method
from fedin import ABLATIONS
from semantics import ENCODERS

RECORDED = ("versions", "input", "digests")  # entries of config.json that are no flags
GENERATOR = (  # flags of AP-FL's generator and of friend models trained on its images
    "lambda", "semantics", "word_vectors", "teacher", "distance", "friend_labels", "noise_dim",
    "synthetic_per_class", "generator_steps", "generator_batch", "friend_epochs")
CALIBRATION = ("virtual_per_class", "calibration_epochs")
AFTER_ROUNDS = (  # flags that no round reads; see --start-from
    "finetune_epochs", "beta", "beta_on", "friend", *GENERATOR, *CALIBRATION)

# Flag -> other flags.  A run reads it only if one of these has one of these values,
ONLY_WITH = {
    **dict.fromkeys(("momentum", "weight_decay"), {"optimizer": ["sgd"]}),
    **dict.fromkeys(("mixing", "staleness", "speed_spread"), {"aggregation": ["async"]}),
    "alpha": {"partition": ["dirichlet"]}, "classes_per_client": {"partition": ["pathological"]},
    "word_vectors": {"semantics": ["word2vec"]},
    **dict.fromkeys(CALIBRATION, {"friend": ["calibrated"], "method": ["ccvr"]}),
    "data_dir": {"dataset": DOWNLOADED, "semantics": ENCODERS}}
# and only if none of these has this value.
NOT_WITH = {
    **dict.fromkeys(GENERATOR, {"friend": "calibrated"}),
    "participation": {"aggregation": "async"}, "momentum": {"method": "scaffold"},
    "noise_on": {"noise": 0, "feature_batches": 0}, "proxy": {"distillation_steps": 0}}


def typed_as(flag: str) -> str:
    """Spelling of a flag on the command line."""
    return f"--{flag.replace('_', '-')}"


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Flags and values as they are typed."""
    words = []
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [typed_as(flag), *map(str, values)]
    return words


def implied_flags(settings: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Flag -> its value and the flag that decides it, as typed."""
    implied = {}
    if settings.get("missing_classes") is not None:
        implied["partition"] = "pathological", "--missing-classes"
    for part in settings.get("ablate", ()):
        for flag, value in ABLATIONS[part].items():
            implied[flag] = value, f"--ablate {' '.join(settings['ablate'])}"
    return implied


def unread_because(flag: str, settings: Mapping[str, Any], implied: Mapping[str, tuple]) -> str:
    """Reason why the run does not read a flag (ONLY_WITH, NOT_WITH), or "" if it does."""
    needs = ONLY_WITH.get(flag, {})
    causes = [other for other, value in NOT_WITH.get(flag, {}).items()
                 if settings.get(other) == value]
    if needs and not any(settings.get(other) in values and not unread_because(
            other, settings, implied) for other, values in needs.items()):
        causes += [other for other in needs if other in settings] or ["method"]
    if not causes:
        return ""
    other = causes[0]
    cause = implied[other][1] if other in implied else f"{typed_as(other)} {settings[other]}"
    return f"with {cause}" if other != "method" else f"by {cause}"


def read_settings(defaults: dict, typed: dict) -> dict:
    """Settings that a run reads: defaults, replaced by typed flags and flags that these imply.

    defaults: every flag that the method reads, in some run or other
    Raises ValueError if the run would not read a typed flag.
    """
    # Flags decided by others come last, in the run's settings as in the error.
    settings = defaults | typed
    implied = implied_flags(settings)
    settings |= {flag: value for flag, (value, _) in implied.items()}

    # Flags without a part in this run
    for flag in list(settings):
        reason = unread_because(flag, settings, implied)
        if flag not in defaults:
            reason = f"by --method {settings['method']}"
        if flag in implied:
            reason = f"with {implied[flag][1]}"
        if reason and flag in typed:
            raise ValueError(f"{typed_as(flag)} is not read {reason}: leave it out")
        if reason and flag not in implied:
            del settings[flag]
    return settings


def check_combination(settings: Mapping[str, Any], methods: Mapping[str, Method]) -> None:
    """Raise ValueError if method, model and aggregation do not go together."""
    name, model = settings["method"], settings["model"]
    choices = {other: {"model": method.networks, "aggregation": method.averages}
               for other, method in methods.items()}
    for flag in ("model", "aggregation"):
        value, allowed = settings.get(flag), choices[name][flag]
        if flag in settings and value not in allowed:
            others = [other for other in methods if value in choices[other][flag]]
            remedy = f"--method {' or '.join(others)}" if len(others) < 6 else "another --method"
            raise ValueError(f"{typed_as(flag)} {value} does not go with --method {name}: give "
                             f"{typed_as(flag)} {' or '.join(allowed)}, or {remedy}")

    # One upload at a time can only be mixed into its own architecture.
    if settings.get("aggregation") == "async" and len(methods[name].networks[model]) > 1:
        raise ValueError(f"--aggregation async needs one architecture, not --model {model}: give "
                         "--model cnn, or one ResNet")
