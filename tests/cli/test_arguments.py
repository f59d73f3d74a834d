"""Words, options with dashes and underscores, YAML files, and what is said about wrong ones."""

from dataclasses import dataclass, field

import pytest

from hf_moe_ext.cli.arguments import UsageError, parse
from hf_moe_ext.cli.common import parse_router
from hf_moe_ext.cli.main import COMMANDS
from hf_moe_ext.cli.upcycle import read_layers
from hf_moe_ext.modeling.router_top_p import TopPRouterConfig


@dataclass
class Example:
    """An example."""

    model: str = field(metadata={"help": "The model."})
    output: str = field(metadata={"help": "The folder."})
    num_experts: int = field(default=8, metadata={"help": "Experts."})
    dry_run: bool = field(default=False, metadata={"help": "Write nothing."})
    layers: str = field(default="all", metadata={"help": "Layers."})
    data: list[str] = field(default_factory=list, metadata={"help": "Files."})
    rate: float = field(default=1.0, metadata={"help": "Rate."})
    extra: str | None = field(default=None, metadata={"help": "Anything."})


def example(*argv: str) -> Example:
    return parse("example", Example, list(argv), positional=("model", "output"))


@pytest.mark.parametrize(
    "argv",
    [
        ("m", "o", "--dry_run", "--num_experts", "4"),
        ("m", "o", "--dry-run", "--num-experts=4"),
        ("--dry-run", "m", "--num-experts", "4", "o"),
        ("--dry_run", "true", "--num_experts", "4", "m", "o"),
        ("--output", "o", "--num_experts", "4", "m", "--dry-run"),
        ("--output=o", "--model=m", "--num-experts", "4", "--dry-run"),
    ],
)
def test_words_and_options_in_any_order(argv):
    args = example(*argv)
    assert (args.model, args.output, args.dry_run, args.num_experts) == ("m", "o", True, 4)


def test_values_may_begin_with_a_dash():
    assert example("m", "o", "--rate", "-2e-3", "--extra", "-x y").rate == -2e-3
    assert example("m", "o", "--extra", "-x y").extra == "-x y"


def test_lists_end_at_the_next_option():
    args = example("m", "o", "--data", "a.txt", "b.txt", "--rate", "2")
    assert args.data == ["a.txt", "b.txt"] and args.rate == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), r"missing: MODEL, OUTPUT\. Usage: hf-moe example MODEL OUTPUT \[options\]"),
        (("m",), "missing: OUTPUT"),
        (("m", "o", "p"), "unexpected `p`"),
        (("m", "o", "--num_expert", "3"), "unknown option `--num_expert`. Did you mean `--num_experts`?"),
        (("m", "o", "--num_experts", "many"), "invalid int value: 'many'"),
        (("m", "o", "--num_experts"), "expected one argument"),
        (("m", "o", "--config"), "`--config` needs a file"),
        (("m", "o", "--config", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("m", "o", "--dry"), "unknown option `--dry`"),
    ],
)
def test_wrong_usage(argv, message):
    with pytest.raises(UsageError, match=message):
        example(*argv)


def test_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\noutput: o\nnum-experts: 4\ndry_run: true\n"
        "layers: [0, 2]\ndata: [a, b]\nrate: -2e-3\nextra: {a: 1}\n"
    )
    args = example("--config", str(path))
    assert args == Example("m", "o", 4, True, "0,2", ["a", "b"], -2e-3, '{"a": 1}')


def test_the_command_line_wins_over_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nnum_experts: 4\ndata: one\nextra: null\n")
    args = example(f"--config={path}", "other", "o", "--num_experts", "2")
    assert (args.model, args.num_experts, args.data, args.extra) == ("other", 2, ["one"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_expert: 3", "unknown option `num_expert`. Did you mean `num_experts`?"),
        ("a: [", "not valid YAML"),
        ("- a", "must hold `option: value` lines, got list"),
        ("num_experts: many", "invalid int value: 'many'"),
        ("dry_run: perhaps", "Truthy value expected"),
        ("", "must hold `option: value` lines, got NoneType"),
    ],
)
def test_wrong_yaml(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        example("m", "o", "--config", str(path))


def test_yaml_that_is_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        example("m", "o", "--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    "text",
    ["top_p:threshold=0.3,renormalize=true", '{"type": "top_p", "threshold": 0.3, "renormalize": true}'],
)
def test_router(text):
    assert parse_router(text) == TopPRouterConfig(threshold=0.3, renormalize=True)


def test_no_router():
    assert parse_router(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_pp", "unknown router type `top_pp`.*Did you mean `top_p`"),
        ("top_p:threshold", "has `threshold`; expected `name:key=value,key=value`"),
        ("top_p:threshold=high", "`threshold` of TopPRouterConfig must be float, got 'high'"),
        ("top_p:max_slots=0", "`max_slots`"),
        ("top_p:treshold=0.4", "unknown key `treshold`.*Did you mean `threshold`"),
        ('{"type": "top_p"', "not valid JSON"),
        ('{"threshold": 0.4}', 'an object with a "type"'),
        ("", "unknown router type ``"),
    ],
)
def test_wrong_router(text, message):
    with pytest.raises(UsageError, match=message):
        parse_router(text)


def test_layers():
    assert read_layers("all") == "all" and read_layers("every:2:1") == "every:2:1"
    assert read_layers("3") == [3] and read_layers("0, -1") == [0, -1]
    assert read_layers("encoder.1,decoder.0") == ["encoder.1", "decoder.0"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, hf_moe):
    """Every option has a line of help; defaults are shown where there are some."""
    result = hf_moe(name, "--help")
    assert result.code == 0 and f"usage: hf-moe {name}" in result.out
    lines = result.out.splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("  --")]
    assert [lines[i] for i in options if len(lines[i].split("  ")) < 3 and not lines[i + 1].startswith("   ")] == []
    assert "default: None" not in result.out and "default: False" not in result.out


def test_help_all(hf_moe):
    short, full = hf_moe("train", "--help").out, hf_moe("train", "--help-all").out
    assert "--deepspeed" not in short and "--deepspeed" in full
    assert "--freeze_router" in short and "default: 5e-05" in " ".join(short.split())
