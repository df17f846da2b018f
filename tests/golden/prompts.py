"""Twenty prompts of as many kinds, as the text that the model reads: a chat is written with its turns' tokens."""

from pathlib import Path

from tokenizers import Tokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat(*turns: str, system: str = SYSTEM) -> str:
    """A conversation, the user's turn first, up to where the assistant's next turn begins."""
    roles = ["system"] + ["user", "assistant"] * len(turns)
    told = zip(roles, [system, *turns], strict=False)
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in told) + "<|im_start|>assistant\n"


_VALLEY = """The valley lies between two ridges that run from north to south, and a river crosses it slowly from one \
side to the other. In spring the snow on the higher ridge melts and the river leaves its bed for two or three weeks. \
The people of the village have built their houses on the terraces above, where the water has not come in living \
memory, and they keep the flat ground below for barley, beans and hay. The mill stands apart, on an island of rock, \
and can be reached by a narrow bridge that is taken down each autumn and put up again in April. The miller's family \
has kept a book since 1784 in which the height of the water is written down every morning. For the first hundred \
years the entries are short: a number, the weather, now and then the price of flour. Later ones grow longer. In 1891 \
the miller of that time, a woman named Agathe, began to note when the swallows came, when the first cherries were \
ripe and on which day the ice broke. Her son went on with it, and so did his daughter. When a student of the weather \
came through the valley in 1962, she was shown the book, stayed for four months and copied every page by hand. What \
she published ten years later was read far beyond the valley, since there are few places where somebody wrote down \
the same five things on every day of two centuries. The spring comes nineteen days earlier now than it did when the \
book begins, and the ice has not held a cart since 1947. The book itself is still at the mill. It is the eleventh \
volume, and the present miller, who grinds only for the baker of the next village and otherwise repairs bicycles, \
writes in it each morning at seven before he opens his workshop. Asked why he goes on, he said that he had never \
thought about it, that the pencil hangs there on its string, and that it would be stranger to stop. His daughter, \
who is fourteen, has put a thermometer into the river that sends its reading to her telephone; but she copies the \
number into the book as well, in ink, because her grandmother told her that pencil fades."""

PROMPTS: dict[str, str] = {
    "chat_capital": chat("What is the capital of France?"),
    "chat_second_turn": chat("Name three fruits.", "Apples, pears and plums.", "Now name three vegetables."),
    "chat_own_system": chat("Where did you bury the gold?", system="You are an old pirate. Answer in two sentences."),
    "chat_long_summary": chat(f"Summarize this text in three sentences.\n\n{_VALLEY}"),
    "long_continuation": _VALLEY + "\n\nOn the first page of the",
    "one_token": "The",
    "one_letter_after_newline": "\nQ",
    "code_python": 'def binary_search(items: list[int], wanted: int) -> int:\n    """Index of wanted, or -1."""\n',
    "code_c": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; ++i) {\n\t",
    "code_sql": "-- Customers with more than 5 orders in 2023\nSELECT c.name, COUNT(*) AS n\nFROM",
    "json": '{"users": [{"id": 1, "name": "Ada", "tags": ["math", "poetry"]}, {"id": 2, "name": "Alan", "tags": [',
    "math": "Solve for x: 3x + 7 = 22.\n\n1. Subtract 7 from both sides: 3x = 15\n2.",
    "digits": "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31,",
    "chinese": "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed",
    "russian_and_arabic": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0645\u0631\u062d\u0628\u0627 ",
    "emoji": "Translate to emoji: I love pizza and cats. \U0001f355\u2764\ufe0f\U0001f408 Now: the family "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 went to the beach.",
    "repeated": "to be or not to be, " * 24,
    "markdown": "# Shopping list\n\n| item | amount | price |\n| --- | ---: | ---: |\n| milk | 2 | 1.20 |\n|",
    "dialogue": '"I never said that," Mara whispered.\n\n"You wrote it down," said the judge, and',
    "trailing_spaces": "The answer to the question is:   ",
}


def prompt_token_ids(model: Path) -> dict[str, list[int]]:
    """Each prompt as token ids of the model in the directory `model`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return {name: tokenizer.encode(text).ids for name, text in PROMPTS.items()}
