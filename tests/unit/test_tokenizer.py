"""Model directories, prompts and chat templates."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers

from protos.duet.inference.v1.inference_pb2 import Chat, ChatMessage, ContentPart
from scheduler_service.errors import InvalidRequest
from scheduler_service.frontend.chat_template import ChatTemplate
from scheduler_service.frontend.tokenizer import UnusableModel, load_model_tokenizer
from tests.small_model import CHAT_TEMPLATE, EOS, byte_fallback_bpe, byte_level_bpe, write_model


def chat(*messages: tuple[str, str]) -> Chat:
    return Chat(messages=[ChatMessage(role=role, content=content) for role, content in messages])


def test_a_model_is_named_after_its_directory_unless_told_otherwise(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny")
    assert load_model_tokenizer(directory, None).name == "tiny"
    assert load_model_tokenizer(directory, "other").name == "other"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [EOS, 0]}, 1, (EOS, 0)),
        ({"eos_token_id": EOS}, 1, (EOS,)),
        ({}, 1, (1,)),
        ({}, [1, 0], (1, 0)),
        ({"eos_token_id": None}, 1, (1,)),
        ({"eos_token_id": []}, 1, ()),
    ],
)
def test_end_of_sequence_comes_from_the_generation_config_first(
    tmp_path: Path, generation: dict[str, object], config: object, expected: tuple[int, ...]
) -> None:
    directory = write_model(tmp_path / "tiny")
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert load_model_tokenizer(directory, None).eos_token_ids == expected


def test_a_model_without_end_of_sequence_has_none(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny")
    (directory / "generation_config.json").unlink()
    (directory / "config.json").write_text("{}")
    assert load_model_tokenizer(directory, None).eos_token_ids == ()


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level_bpe().to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    model = load_model_tokenizer(write_model(tmp_path / "tiny", tokenizer), None)
    expected = byte_level_bpe().encode("the quick brown fox").ids
    assert model.encode("the quick brown fox", add_special_tokens=True) == expected


def test_text_gets_the_models_own_leading_token_and_rendered_chat_does_not(tmp_path: Path) -> None:
    model = load_model_tokenizer(write_model(tmp_path / "tiny", byte_fallback_bpe()), None)
    plain = model.encode("the fox", add_special_tokens=False)
    assert model.encode("the fox", add_special_tokens=True) == [1, *plain]


def test_a_text_of_more_than_most_bytes_has_more_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level_bpe().to_str())
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore
    model = load_model_tokenizer(write_model(tmp_path / "tiny", tokenizer), None)
    for text in ("the " * 500, "\u1112\u1161\u11ab" * 200, "α\u0313\u0301\u0345" * 200):
        num_tokens = len(model.encode(text, add_special_tokens=False))
        assert len(text.encode()) <= model.most_bytes(num_tokens)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", None, "no config.json"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "JSON object"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
        ("chat_template.jinja", b"caf\xe9", "chat_template.jinja is not UTF-8"),
        ("tokenizer_config.json", '{"chat_template": [{"template": "a"}]}', "lacks its name or template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "lacks its name or template"),
        ("tokenizer_config.json", '{"chat_template": ["a"]}', "lacks its name or template"),
        ("tokenizer_config.json", '{"chat_template": 7}', "not a string"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 7}]}', "not a string"),
        ("tokenizer_config.json", '{"chat_template": "a", "bos_token": {}}', "bos_token of .* has no content"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "'</s>', which is no token id"),
        ("generation_config.json", '{"eos_token_id": [2, -1]}', "-1, which is no token id"),
        ("generation_config.json", '{"eos_token_id": [2, null]}', "None, which is no token id"),
        ("generation_config.json", '{"eos_token_id": true}', "True, which is no token id"),
        ("generation_config.json", '{"eos_token_id": 2.0}', "2.0, which is no token id"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: str | bytes | None, complaint: str
) -> None:
    directory = write_model(tmp_path / "tiny")
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnusableModel, match=complaint) as caught:
        load_model_tokenizer(directory, None)
    assert "\n" not in str(caught.value)


def test_a_template_file_goes_before_the_tokenizer_config(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny")
    (directory / "chat_template.jinja").write_text("from the file")
    assert load_model_tokenizer(directory, None).render(chat(("user", "hi"))) == "from the file"


def test_the_default_of_several_named_templates_is_used(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": "right"}]
    model = load_model_tokenizer(write_model(tmp_path / "tiny", chat_template=templates), None)
    assert model.render(chat(("user", "hi"))) == "right"


def test_special_tokens_are_given_to_the_template_as_strings(tmp_path: Path) -> None:
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}"
    directory = write_model(tmp_path / "tiny", chat_template=template, bos_token={"content": "<s>"}, pad_token=None)
    assert load_model_tokenizer(directory, None).render(chat(("user", "hi"))) == "<s>|<|im_end|>|False"


def test_a_model_without_a_template_refuses_chat(tmp_path: Path) -> None:
    model = load_model_tokenizer(write_model(tmp_path / "tiny", chat_template=None), None)
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        model.render(chat(("user", "hi")))
    assert caught.value.field == "chat"


def test_a_conversation_is_rendered_with_a_generation_prompt() -> None:
    rendered = ChatTemplate(CHAT_TEMPLATE, {}).render(chat(("system", "Be brief."), ("user", "Hi")))
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_rendering_is_what_transformers_renders() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = """
    {%- for message in messages %}
        {% if message.role == 'skip' %}{% continue %}{% endif %}
        {%- generation %}{{ message | tojson }}{% endgeneration %}
    {% endfor %}
    {{ eos_token }} {{ strftime_now('%%') }} {{ tools is none }} {% if add_generation_prompt %}go{% endif %}
"""
    messages = [("user", "<b>'ü'</b>"), ("skip", "x"), ("assistant", "ok")]
    conversation = [{"role": role, "content": content} for role, content in messages]
    expected, _ = render_jinja_template(
        conversations=[conversation], chat_template=template, add_generation_prompt=True, eos_token="</s>"
    )
    assert ChatTemplate(template, {"eos_token": "</s>"}).render(chat(*messages)) == expected[0]


def test_parts_are_joined_to_one_string() -> None:
    parts = [ContentPart(text="a"), ContentPart(text="b")]
    message = ChatMessage(role="user", parts=parts)
    assert ChatTemplate("{{ messages[0]['content'] }}", {}).render(Chat(messages=[message])) == "ab"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (ChatMessage(role="user"), "chat.messages[1].content"),
        (ChatMessage(role="user", content="a", parts=[ContentPart(text="b")]), "chat.messages[1].content"),
        (ChatMessage(content="a"), "chat.messages[1].role"),
        (ChatMessage(role="user", parts=[ContentPart()]), "chat.messages[1].parts[0].text"),
    ],
)
def test_a_message_that_says_nothing_or_twice_is_refused(message: ChatMessage, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHAT_TEMPLATE, {}).render(Chat(messages=[ChatMessage(role="user", content="hi"), message]))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_what_a_template_raises_is_the_requests_fault(template: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        ChatTemplate(template, {}).render(chat(("user", "hi")))
    assert caught.value.field == "chat"
