"""The tokenizer and the image processor of the demo's model, as InternVL's processor."""

from typing import TYPE_CHECKING

from emloc_demo.vision.pictures import COLOURS, NEW_QUESTION, QUESTIONS, SIDE

if TYPE_CHECKING:
    from transformers import InternVLProcessor, PreTrainedTokenizerFast

PATCH = 8
#: Tokens of a picture. Four patches become one, so each cell of the grid is one.
IMAGE_TOKENS = (SIDE // PATCH // 2) ** 2
START, CONTEXT, STOP = "<img>", "<IMG_CONTEXT>", "</img>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
_PAD, _UNKNOWN = "<pad>", "<unk>"
#: By the names under which InternVL's processor looks for them.
_NAMED = {
    "start_image_token": START,
    "context_image_token": CONTEXT,
    "end_image_token": STOP,
    "video_token": "<video>",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a tokenizer of whole words: those of the questions and answers, and no others."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    sentences = [*QUESTIONS.values(), NEW_QUESTION, *COLOURS, *"0123456789"]
    words = {word for text in sentences for word, _ in Whitespace().pre_tokenize_str(text.format(colour="", digit=""))}
    special = [_PAD, _UNKNOWN, USER, ASSISTANT, END, *_NAMED.values()]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=END,
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
    )


def make_processor() -> "InternVLProcessor":
    """Return the processor: pictures of ``SIDE`` pixels as one tile, and :func:`make_tokenizer`."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    pixels = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return InternVLProcessor(
        GotOcr2ImageProcessor(**pixels, crop_to_patches=False),
        make_tokenizer(),
        InternVLVideoProcessor(**pixels),  # the processor's class wants one; there are no videos here
        image_seq_length=IMAGE_TOKENS,
        chat_template=_CHAT_TEMPLATE,
    )
