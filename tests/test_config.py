"""Stream and DeepSpeed configurations: what ships loads, what is unknown is refused, the options are frozen."""

import json
from pathlib import Path

import pytest
import yaml
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import BaseModel

from data_contracts import load_contract
from data_contracts.errors import UserError
from pipeline.config import (
    ReviewConfig,
    RouterConfig,
    StoreConfig,
    StreamConfig,
    build_method,
    load_stream,
    method_module,
    method_names,
    override_config,
)
from pipeline.placement.learner import engine_config, read_deepspeed_config
from tests.helpers import make_stream, stream_dict

ROOT = Path(__file__).resolve().parents[1]
STREAMS = sorted((ROOT / "jobs" / "streams").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "deepspeed_configs").glob("*.json"))

# An option that comes, goes or is renamed shows here: streams in the field name them.
OPTIONS = """
    stream work_dir data_roots tasks start_from deepspeed seed
    backbone.path backbone.dtype backbone.revision backbone.trust_remote_code
    rows.train rows.validation rows.test
    training.epochs training.batch_size training.micro_batch_size training.micro_batch_tokens training.learning_rate
    training.routed_learning_rate training.weight_decay training.warmup_fraction training.gradient_clipping
    training.max_loss_factor training.save_every training.activation_checkpointing
    evaluation.batch_tokens evaluation.baselines evaluation.earlier_tasks evaluation.review
    router
    store
    gate.max_regression gate.min_metric gate.on_reject
    tracking.uri tracking.experiment tracking.registered_model tracking.artifact_location
    tracking.system_metrics
    watch.limit_seconds watch.grace_seconds
    spans.enabled spans.every spans.max_bytes
    method
"""
OPTIONAL_OPTIONS = {  # of sections that may be null
    ReviewConfig: "target_precision",
    StoreConfig: "uri",
    RouterConfig: "layers features regularisation max_tokens rows seed",
}
LORA = "lora.rank lora.alpha lora.dropout lora.targets"
METHOD_OPTIONS = {
    "moe_cl": f"""{LORA} gate warm_start adversary.weight adversary.outputs adversary.negatives
        retention.policy retention.margin
        learning_rates.shared learning_rates.dedicated learning_rates.gate learning_rates.discriminator""",
    "sequential": LORA,
    "per_task": LORA,
    "replay": f"{LORA} share",
    "multitask": LORA,
    "ewc": f"{LORA} weight decay fisher_rows",
    "olora": f"{LORA} weight",
    "mocl": LORA,
    "moses": f"{LORA} sub_experts top_k density head_start novelty",
    "zero_shot": "",
}


def option_names(model: type[BaseModel], prefix: str = "") -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names |= option_names(inner, f"{prefix}{name}.")
        else:
            names.add(prefix + name)
    return names


@pytest.fixture
def stream(tmp_path) -> Path:
    return make_stream(tmp_path / "tiny.yaml", tmp_path / "work", tmp_path, tmp_path, [tmp_path / "a.yaml"])


def test_the_list_of_options_is_frozen():
    assert option_names(StreamConfig) == set(OPTIONS.split())
    for section, names in OPTIONAL_OPTIONS.items():
        assert option_names(section) == set(names.split())


def test_the_list_of_method_options_is_frozen():
    found = {name: option_names(method_module(name).Options) for name in method_names()}
    assert found == {name: set(text.split()) for name, text in METHOD_OPTIONS.items()}


# ---------------------------------------------------------------- what ships


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_every_shipped_stream_loads_with_its_contracts_method_and_deepspeed_file(path):
    config = load_stream(path)
    tasks = [load_contract(ROOT / task).task for task in config.tasks]
    assert len(set(tasks)) == len(tasks)
    assert build_method(config).retention.policy in ("follow", "pin", "best")
    read_deepspeed_config(str(ROOT / config.deepspeed))
    read_again = StreamConfig.model_validate(config.model_dump(mode="json"))
    assert read_again == config and read_again.method == config.method


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_shipped_deepspeed_file_is_taken_by_deepspeed(path, dtype, stream):
    config = load_stream(stream, [f"backbone.dtype={dtype}", "training.gradient_clipping=0.5"])
    settings = engine_config(read_deepspeed_config(str(path)), config)
    parsed = DeepSpeedConfig(settings)
    assert parsed.zero_config.stage == (2 if "zero2" in path.stem else 3)
    assert parsed.bfloat16_config.enabled is (dtype == "bfloat16") and not parsed.float16_config.enabled
    assert parsed.gradient_clipping == 0.5 and parsed.gradient_accumulation_steps == 1
    assert set(json.loads(path.read_text())) < set(settings)


def test_something_ships():
    assert [path.stem for path in STREAMS].count("quickstart") == 1
    assert {"zero2", "zero3"} <= {path.stem for path in DEEPSPEED}


# ---------------------------------------------------------------- overrides and refusals


def test_overrides_are_yaml_values_at_any_depth(stream):
    config = load_stream(
        stream,
        [
            "training.epochs=7",
            "training.learning_rate=5e-4",
            "method.lora.targets=[down_proj]",
            "gate.min_metric={a: 0.5}",
            "tracking.uri=http://host:5000",
            "rows.train=null",
            "training.epochs=8",
        ],
    )
    assert config.training.epochs == 8 and config.training.learning_rate == 5e-4
    assert config.method["lora"]["targets"] == ["down_proj"] and config.method["lora"]["rank"] == 3
    assert config.gate.min_metric == {"a": 0.5} and config.tracking.uri == "http://host:5000"
    assert config.rows.train is None


def test_an_override_changes_the_result_and_not_what_it_was_given(tmp_path):
    raw = stream_dict(tmp_path, tmp_path, tmp_path, [tmp_path / "a.yaml"])
    before = yaml.safe_dump(raw)
    assert override_config(raw, ["method.lora.rank=5"], "here").method["lora"]["rank"] == 5
    assert yaml.safe_dump(raw) == before


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.epoch=3", r"unknown key 'training\.epoch'; remove it or correct its spelling"),
        ("gates.max_regression=0.1", "unknown key 'gates'"),
        ("backbone.torch_dtype=bfloat16", r"unknown key 'backbone\.torch_dtype'"),
        ("method.lora.ranks=4", r"unknown key 'method\.lora\.ranks'"),
        ("method.retention.margins=4", r"unknown key 'method\.retention\.margins'"),
        ("training.epochs=0", r"training\.epochs: Input should be greater than or equal to 1"),
        ("training.learning_rate=.inf", r"training\.learning_rate: Input should be a finite number"),
        ("gate.min_metric=.nan", r"gate\.min_metric.*finite number"),
        ("method.lora.dropout=1", r"method\.lora\.dropout: Input should be less than 1"),
        ("method.name=ewc2", "method.name is 'ewc2'; it must be one of: .*moe_cl"),
        ("method.name=protocol", "method.name is 'protocol'; it must be one of"),
        ("method={lora: {rank: 4}}", "method.name is None; it must be one of"),
        ("backbone.dtype=float16", r"backbone\.dtype: Input should be 'bfloat16' or 'float32'"),
        ("backbone.trust_remote_code=true", r"backbone\.trust_remote_code: Input should be False"),
        ("stream=../up", "stream: String should match pattern"),
        ("tasks=[a.yaml, a.yaml]", "tasks: a contract file is named twice"),
        ("tasks=[]", "tasks: Tuple should have at least 1 item"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed.more=1", "'seed' is a value, not a section"),
        ("training.epochs", "write it as key.path=value"),
        ("=3", "write it as key.path=value"),
        ("training.epochs=[1", "the value is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(stream, override, told):
    overrides = ["seed=1", override] if override.startswith("seed.") else [override]
    with pytest.raises(UserError, match=told) as raised:
        load_stream(stream, overrides)
    assert "\n" not in str(raised.value) and "pydantic" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("stream: [", "not valid YAML"),
        ("- a\n- b\n", "a stream file is a mapping"),
        ("", "a stream file is a mapping"),
        ("stream: x\n", "work_dir: Field required"),
        ("stream: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_stream_is_refused_by_its_name(tmp_path, content, told):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"bad\.yaml: .*{told}"):
        load_stream(path)


def test_a_missing_stream_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot read the stream file"):
        load_stream(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimization": {"stage": 1}}', "stage 1; this pipeline runs stages 2 and 3"),
        ('{"zero_optimization": true}', "this pipeline runs stages 2 and 3"),
        ("{}", "this pipeline runs stages 2 and 3"),
        ('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}', "sets 'bf16', which the stream sets by"),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": 8}', "sets 'train_batch_size', which the stream"),
    ],
)
def test_a_deepspeed_file_that_cannot_work_is_refused(tmp_path, content, told):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"deepspeed: .*bad\.json.*{told}"):
        read_deepspeed_config(str(path))
    with pytest.raises(UserError, match="cannot read"):
        read_deepspeed_config(str(tmp_path / "none.json"))


# ---------------------------------------------------------------- what decides the numbers


def learned(stream: Path, *overrides: str) -> str:
    return json.dumps(load_stream(stream, overrides).learning(), sort_keys=True)


@pytest.mark.parametrize(
    "override",
    [
        "work_dir=elsewhere",
        "data_roots=[elsewhere]",
        "backbone.path=elsewhere",
        "deepspeed=deepspeed_configs/zero2.json",
        "tracking.uri=http://host",
        "training.save_every=1",
        "watch.limit_seconds=5",
        "spans.enabled=false",
        "tracking.system_metrics=true",
        "training.activation_checkpointing=true",
        "gate.on_reject=continue",
    ],
)
def test_paths_addresses_and_placement_do_not_decide_what_is_learned(stream, override):
    assert learned(stream, override) == learned(stream)
    assert "elsewhere" not in learned(stream, override)


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "method.lora.rank=9",
        "rows.train=5",
        "training.epochs=9",
        "training.batch_size=2",
        "gate.max_regression=1",
    ],
)
def test_what_decides_the_numbers_is_in_the_learning_configuration(stream, override):
    assert learned(stream, override) != learned(stream)


def test_defaults_are_filled_in_so_that_the_learning_configuration_says_everything(stream):
    method = json.loads(learned(stream))["method"]
    assert method["name"] == "moe_cl" and method["adversary"] == {
        "weight": 0.1,
        "outputs": 8,
        "negatives": "prototypes",
    }
    assert method["retention"] == {"policy": "best", "margin": None} and method["gate"] == "per_task"


def test_configuration_does_not_change_after_reading(stream):
    config = load_stream(stream)
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 5
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5
