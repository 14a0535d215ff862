"""The named templates as data: what each writes around messages.

`templates` renders by them. A template writes what its model's own chat template writes;
`DIFFERENCES` lists where LLaMA-Factory's of the same name writes something else, and why.
`docs/templates.md` is made from this table.
"""

# the models' own words, with full-width marks

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Template:
    """A text format as data. `{bos}` and `{eos}` stand for the tokenizer's own tokens.

    Attributes:
        user: a prompt, up to the header of the response.
        response: a response, with its end.
        header: what stands before a response.
        system: a system message.
        default_system: the system message of conversations without one; none if empty.
        prefix: what stands before everything.
        observation: the result of a tool; empty: as `user`.
        results: what stands around all results that follow one another.
        joint: what stands between them.
        function: a response that calls tools; empty: as `response`.
        tool_format: a name of `tools.FORMATS`.
        tool_list: what takes the place of the format's text about tools; empty: nothing does.
        fuses_system: whether the system message stands inside the first user message.
        tools: the text about tools by itself; empty: it ends the system message.
        tools_before: what it stands before, where it is by itself.
        strip: the messages around which blanks are taken away.
        end_of_turn: the token that ends a response, at which generation stops; empty: `{eos}`.
        more_stop_words: other tokens at which generation stops.
        end_of_text: the token after a text of stage pt, where it is not the tokenizer's `{eos}`.
        efficient_eos: whether no token ends a response in the text: `{eos}` is learned where the
            next message begins, and stands at the end of the conversation alone.
        between: what stands after a response when a message follows, before that.
        thought: what stands before and after a thought; None: thoughts are words like others.
        past_thought: what stands for the thought of an earlier response, which is left out.
        unthinking: what is added to a user message where thinking is off.
        thinking_system: what a system message begins with where thinking is on.
    """

    user: str
    response: str
    header: str
    system: str
    default_system: str = ""
    prefix: str = ""
    observation: str = ""
    results: str = "{content}"
    joint: str = ""
    function: str = ""
    tool_format: str = "default"
    tool_list: str = ""
    fuses_system: bool = False
    tools: str = ""
    tools_before: Literal["system", "user"] = "system"
    strip: Literal["none", "responses", "all"] = "none"
    end_of_turn: str = ""
    more_stop_words: tuple[str, ...] = ()
    end_of_text: str = ""
    efficient_eos: bool = False
    between: str = ""
    thought: tuple[str, str] | None = None
    past_thought: str = ""
    unthinking: str = ""
    thinking_system: str = ""


HELPFUL = "You are a helpful assistant."
LLAVA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
THINK = ("<think>\n", "\n</think>\n\n")
CLOSE_THINK = ("<think>", "</think>")

# --- families: rows that share their text ---------------------------------------------------------

PLAIN_CHATML = Template(
    user="<|im_start|>user\n{content}<|im_end|>\n",
    header="<|im_start|>assistant\n",
    response="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    end_of_turn="<|im_end|>",
)
CHATML = replace(PLAIN_CHATML, observation="<|im_start|>tool\n{content}<|im_end|>\n")
QWEN = replace(
    PLAIN_CHATML,
    observation="<tool_response>\n{content}\n</tool_response>",
    results="<|im_start|>user\n{content}<|im_end|>\n",
    joint="\n",
    tool_format="qwen",
)
QWEN3 = replace(QWEN, thought=THINK)
QWEN3_5 = replace(QWEN3, tool_format="qwen3_5")
QWEN2_VL = replace(QWEN, default_system=HELPFUL)
LFM2 = replace(
    CHATML,
    prefix="{bos}",
    observation=(
        "<|im_start|>tool\n<|tool_response_start|>{content}<|tool_response_end|><|im_end|>\n"
    ),
    tool_format="lfm2",
)
LLAMA3 = Template(
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    response="{content}<|eot_id|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    observation="<|start_header_id|>ipython<|end_header_id|>\n\n{content}<|eot_id|>",
    tool_format="llama3",
    prefix="{bos}",
    strip="all",
    end_of_turn="<|eot_id|>",
    more_stop_words=("<|eom_id|>",),
    end_of_text="<|end_of_text|>",
)
LLAMA2 = Template(
    user="{bos}[INST] {content} [/INST]",
    header="",
    response="{content}{eos}",
    system="<<SYS>>\n{content}\n<</SYS>>\n\n",
    fuses_system=True,
)
MISTRAL = Template(
    user="[INST] {content}[/INST]",
    header="",
    response=" {content}{eos}",
    system="{content}\n\n",
    observation='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
    function="[TOOL_CALLS] {content}{eos}",
    tool_format="mistral",
    prefix="{bos}",
    fuses_system=True,
    tools="{content}",
    tools_before="user",
)
MINISTRAL = replace(
    MISTRAL,
    user="[INST]{content}[/INST]",
    response="{content}{eos}",
    observation='[TOOL_RESULTS]{"content": {content}}[/TOOL_RESULTS]',
    function="[TOOL_CALLS]{content}{eos}",
)
GEMMA = Template(
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    header="<start_of_turn>model\n",
    response="{content}<end_of_turn>\n",
    system="{content}\n\n",
    observation="<start_of_turn>tool\n{content}<end_of_turn>\n",
    prefix="{bos}",
    fuses_system=True,
    strip="all",
    end_of_turn="<end_of_turn>",
)
GEMMA4 = Template(
    user="<|turn>user\n{content}<turn|>\n",
    header="<|turn>model\n",
    response="{content}<turn|>\n",
    system="<|turn>system\n{content}<turn|>\n",
    observation="<|turn>tool\n{content}<turn|>\n",
    tool_format="gemma4",
    prefix="{bos}",
    strip="all",
    end_of_turn="<turn|>",
    thought=("<|channel>thought\n", "<channel|>"),
    thinking_system="<|think|>",
)
GLM4 = Template(
    user="<|user|>\n{content}",
    header="<|assistant|>",
    response="\n{content}",
    system="<|system|>\n{content}",
    observation="<|observation|>\n{content}",
    function="{content}",
    tool_format="glm4",
    prefix="[gMASK]<sop>",
    efficient_eos=True,
    more_stop_words=("<|user|>", "<|observation|>"),
)
GLMZ1 = replace(GLM4, thought=("\n<think>\n", "\n</think>\n"))
GLM4_MOE = replace(
    GLM4,
    observation="\n<tool_response>\n{content}\n</tool_response>",
    results="<|observation|>{content}",
    function="\n{content}",
    tool_format="glm4_moe",
    strip="responses",
    tools="<|system|>\n{content}",
    thought=("\n<think>", "</think>"),
    past_thought="\n<think></think>",
    unthinking="/nothink",
)
GLM4_7 = replace(
    GLM4_MOE,
    user="<|user|>{content}",
    response="{content}",
    system="<|system|>{content}",
    observation="<tool_response>{content}</tool_response>",
    function="{content}",
    thought=CLOSE_THINK,
    past_thought="</think>",
    unthinking="",
)
DEEPSEEK3 = Template(
    user="<｜User｜>{content}",
    header="<｜Assistant｜>",
    response="{content}{eos}",
    system="{content}",
    prefix="{bos}",
)
VICUNA = Template(
    user="USER: {content} ",
    header="ASSISTANT:",
    response="{content}{eos}",
    system="{content}",
    default_system=LLAVA,
)
BAILING = Template(
    user="<role>HUMAN</role>{content}",
    header="<role>ASSISTANT</role>",
    response="{content}",
    system="<role>SYSTEM</role>{content}",
    observation="<role>OBSERVATION</role>{content}",
    efficient_eos=True,
    more_stop_words=("<|endoftext|>",),
)
KIMI = Template(
    user="<|im_user|>user<|im_middle|>{content}<|im_end|>",
    header="<|im_assistant|>assistant<|im_middle|>",
    response="{content}<|im_end|>",
    system="<|im_system|>system<|im_middle|>{content}<|im_end|>",
    end_of_turn="<|im_end|>",
)
GRANITE = Template(
    user="<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n",
    header="<|start_of_role|>assistant<|end_of_role|>",
    response="{content}<|end_of_text|>\n",
    system="<|start_of_role|>system<|end_of_role|>{content}<|end_of_text|>\n",
    end_of_turn="<|end_of_text|>",
)
SEED = Template(
    user="{bos}user\n{content}{eos}",
    header="{bos}assistant\n",
    response="{content}{eos}",
    system="{bos}system\n{content}{eos}",
)
HUNYUAN_SMALL = Template(
    user="<｜hy_User｜>{content}<｜hy_place▁holder▁no▁8｜>",
    header="",
    response="{content}<｜hy_place▁holder▁no▁2｜>",
    system="{content}<｜hy_place▁holder▁no▁3｜>",
    prefix="<｜hy_begin▁of▁sentence｜>",
    end_of_turn="<｜hy_place▁holder▁no▁2｜>",
)
PHI = Template(
    user="<|user|>\n{content}<|end|>\n",
    header="<|assistant|>\n",
    response="{content}<|end|>\n",
    system="<|system|>\n{content}<|end|>\n",
    end_of_turn="<|end|>",
)
DEFAULT = Template(
    user="Human: {content}{eos}\n",
    header="Assistant:",
    response="{content}{eos}\n",
    system="System: {content}{eos}\n",
)
INTERN_VL = replace(PLAIN_CHATML, prefix="{bos}")
MINICPM_V = replace(PLAIN_CHATML, default_system=HELPFUL)

# --- the table ------------------------------------------------------------------------------------

TEMPLATES: dict[str, Template] = {
    "aeva": replace(
        GLM4_7,
        default_system="You are an AI assistant named Aeva created by Zongzhi Lou. Your answer "
        "should be friendly, unbiased, faithful, informative and detailed.",
    ),
    "alpaca": Template(
        user="### Instruction:\n{content}\n\n",
        header="### Response:\n",
        response="{content}{eos}\n\n",
        system="{content}",
        default_system="Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n",
    ),
    "bailing": BAILING,
    "bailing_v2": replace(
        BAILING,
        user="<role>HUMAN</role>{content}<|role_end|>",
        response="{content}<|role_end|>",
        system="<role>SYSTEM</role>{content}<|role_end|>",
        observation="\n<tool_response>\n{content}\n</tool_response>",
        results="<role>OBSERVATION</role>{content}<|role_end|>",
        tool_format="ling",
    ),
    "breeze": Template(
        user="[INST] {content} [/INST] ",
        header="",
        response="{content}",
        system="{content}",
        prefix="{bos}",
        efficient_eos=True,
    ),
    "chatglm3": replace(GLM4, prefix="[gMASK]sop"),
    "chatml": replace(CHATML, more_stop_words=("<|im_start|>",)),
    "chatml_de": replace(
        CHATML,
        default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
        more_stop_words=("<|im_start|>",),
    ),
    "cohere": Template(
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        header="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        response="{content}{eos}",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        prefix="{bos}",
    ),
    "cpm4": replace(CHATML, prefix="{bos}"),
    "custom": DEFAULT,
    "dbrx": replace(
        CHATML,
        default_system="You are DBRX, created by Databricks. You were last updated in December "
        "2023. You answer questions based on information available up to that point.\nYOU PROVIDE "
        "SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough responses to more "
        "complex and open-ended questions.\nYou assist with various tasks, from writing to coding "
        "(using markdown for code blocks — remember to use ``` with code, JSON, and tables).\n(You "
        "do not have real-time data access or code execution capabilities. You avoid stereotyping "
        "and provide balanced perspectives on controversial topics. You do not provide song "
        "lyrics, poems, or news articles and do not divulge details of your training data.)\nThis "
        "is your system prompt, guiding your responses. Do not reference it, just respond to the "
        "user. If you find yourself talking about this message, stop. You should be responding "
        "appropriately and usually that means not mentioning this.\nYOU DO NOT MENTION ANY OF THIS "
        "INFORMATION ABOUT YOURSELF UNLESS THE INFORMATION IS DIRECTLY PERTINENT TO THE USER'S "
        "QUERY.",
    ),
    "deepseek": Template(
        user="User: {content}\n\n",
        header="Assistant:",
        response="{content}{eos}",
        system="{content}\n\n",
        prefix="{bos}",
    ),
    "deepseek3": DEEPSEEK3,
    "deepseekcoder": Template(
        user="### Instruction:\n{content}\n",
        header="### Response:",
        response="\n{content}\n<|EOT|>\n",
        system="{content}",
        default_system="You are an AI programming assistant, utilizing the DeepSeek Coder model, "
        "developed by DeepSeek Company, and you only answer questions related to computer science. "
        "For politically sensitive questions, security and privacy issues, and other non-computer "
        "science questions, you will refuse to answer.\n",
        prefix="{bos}",
        end_of_turn="<|EOT|>",
    ),
    "deepseekr1": replace(DEEPSEEK3, thought=THINK),
    "default": DEFAULT,
    "dots_ocr": Template(
        user="<|user|>{content}<|endofuser|>",
        header="<|assistant|>",
        response="{content}<|endofassistant|>",
        system="<|system|>{content}<|endofsystem|>\n",
        efficient_eos=True,
        more_stop_words=("<|endofassistant|>",),
    ),
    "empty": Template(user="{content}", header="", response="{content}", system="{content}"),
    "ernie": Template(
        user="<|im_start|>user\n{content}<|im_end|>\n\n",
        header="<|im_start|>assistant\n",
        response="{content}<|im_end|>\n\n",
        system="<|im_start|>system\n{content}<|im_end|>\n\n",
        default_system="<global_setting>\nthink_mode=True\n</global_setting>",
        observation="<|im_start|>tool\n{content}<|im_end|>\n\n",
        end_of_turn="<|im_end|>",
    ),
    "ernie_nothink": Template(
        user="User: {content}\n",
        header="Assistant: ",
        response="{content}<|end_of_sentence|>",
        system="{content}\n",
        prefix="<|begin_of_sentence|>",
        end_of_turn="<|end_of_sentence|>",
    ),
    "ernie_vl": Template(
        user="User: {content}",
        header="\nAssistant: ",
        response="{content}<|end_of_sentence|>",
        system="{content}\n",
        end_of_turn="<|end_of_sentence|>",
        thought=THINK,
    ),
    "exaone": Template(
        user="[|user|]{content}\n",
        header="[|assistant|]",
        response="{content}{eos}\n",
        system="[|system|]{content}[|endofturn|]\n",
    ),
    "falcon": Template(
        user="User: {content}\n",
        header="Falcon:",
        response="{content}\n",
        system="{content}",
        efficient_eos=True,
    ),
    "falcon_h1": replace(CHATML, prefix="{bos}", more_stop_words=("<|end_of_text|>",)),
    "fewshot": Template(
        user="{content}",
        header="",
        response="{content}\n\n",
        system="{content}",
        efficient_eos=True,
    ),
    "gemma": GEMMA,
    "gemma2": replace(
        GEMMA, end_of_turn="", efficient_eos=True, more_stop_words=("<eos>", "<end_of_turn>")
    ),
    "gemma3": GEMMA,
    "gemma3n": GEMMA,
    "gemma4": GEMMA4,
    "gemma4n": GEMMA4,
    "glm4": GLM4,
    "glm4_5v": replace(GLM4_MOE, more_stop_words=(*GLM4.more_stop_words, "</answer>")),
    "glm4_7": GLM4_7,
    "glm4_moe": GLM4_MOE,
    "glm4v": replace(GLMZ1, more_stop_words=(*GLM4.more_stop_words, "</answer>")),
    "glm_ocr": GLM4,
    "glmz1": GLMZ1,
    "gpt_oss": Template(
        user="<|start|>user<|message|>{content}<|end|>",
        header="<|start|>assistant",
        response="<|channel|>final<|message|>{content}",
        system="<|start|>system<|message|>{content}<|end|>",
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        efficient_eos=True,
        between="<|end|>",
        thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    ),
    "granite3": GRANITE,
    "granite3_vision": Template(
        user="<|user|>\n{content}\n",
        header="<|assistant|>\n",
        response="{content}{eos}",
        system="<|system|>\n{content}\n",
        default_system=LLAVA,
    ),
    "granite4": replace(
        GRANITE,
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant.",
        observation="\n<tool_response>\n{content}\n</tool_response>",
        results="<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n",
    ),
    "hunyuan": Template(
        user="{content}<|extra_0|>",
        header="",
        response="{content}<|eos|>",
        system="{content}<|extra_4|>",
        prefix="<|startoftext|>",
        end_of_turn="<|eos|>",
    ),
    "hunyuan_small": HUNYUAN_SMALL,
    "hy3": Template(
        user="<｜hy_User｜>{content}",
        header="<｜hy_Assistant｜>",
        response="{content}<｜hy_eos｜>",
        system="{content}",
        prefix="{bos}",
        end_of_turn="<｜hy_eos｜>",
        thought=CLOSE_THINK,
    ),
    "hy_dense_1_8b": HUNYUAN_SMALL,
    "hy_dense_7b": Template(
        user="{content}<|extra_0|>",
        header="",
        response="{content}",
        system="{content}<|extra_4|>",
        prefix="{bos}",
        efficient_eos=True,
        more_stop_words=("<|eos|>",),
    ),
    "index": Template(
        user="reserved_0{content}",
        header="reserved_1",
        response="{content}",
        system="<unk>{content}",
        efficient_eos=True,
    ),
    "intern2": replace(
        INTERN_VL,
        default_system="You are an AI assistant whose name is InternLM (书生·浦语).\n"
        "- InternLM (书生·浦语) is a conversational language model that is developed by "
        "Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and "
        "harmless.\n"
        "- InternLM (书生·浦语) can understand and communicate fluently in the language "
        "chosen by the user such as English and 中文.",
    ),
    "intern_s1": INTERN_VL,
    "intern_vl": replace(
        INTERN_VL,
        default_system="你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
        "联合开发的多模态大语言模型。",
    ),
    "keye_vl": QWEN3,
    "kimi_vl": replace(
        KIMI, default_system="You are a helpful assistant", thought=("◁think▷", "◁/think▷")
    ),
    "lfm2": LFM2,
    "lfm2_vl": replace(LFM2, default_system="You are a helpful multimodal assistant by Liquid AI."),
    "llama2": LLAMA2,
    "llama2_zh": replace(
        LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"
    ),
    "llama3": LLAMA3,
    "llama4": replace(
        LLAMA3,
        user="<|header_start|>user<|header_end|>\n\n{content}<|eot|>",
        header="<|header_start|>assistant<|header_end|>\n\n",
        response="{content}<|eot|>",
        system="<|header_start|>system<|header_end|>\n\n{content}<|eot|>",
        observation="<|header_start|>ipython<|header_end|>\n\n{content}<|eot|>",
        end_of_turn="<|eot|>",
        more_stop_words=("<|eom|>",),
    ),
    "llava": VICUNA,
    "llava_next": VICUNA,
    "llava_next_llama3": LLAMA3,
    "llava_next_mistral": MISTRAL,
    "llava_next_qwen": QWEN2_VL,
    "llava_next_video": VICUNA,
    "llava_next_video_mistral": MISTRAL,
    "llava_next_video_yi": PLAIN_CHATML,
    "llava_next_yi": PLAIN_CHATML,
    "mimo": replace(QWEN3, default_system=HELPFUL),
    "mimo_v2": replace(
        QWEN3,
        default_system="You are MiMo, a helpful AI assistant engineered by Xiaomi.",
        thought=CLOSE_THINK,
    ),
    "mimo_vl": replace(QWEN3, default_system="You are MiMo, an AI assistant developed by Xiaomi."),
    "minicpm_o": replace(
        MINICPM_V,
        default_system="You are a helpful assistant. You can accept audio and text input and "
        "output voice and text.",
    ),
    "minicpm_v": MINICPM_V,
    "minicpm_v_4_6": MINICPM_V,
    "minimax1": Template(
        user="<beginning_of_sentence>user name=user\n{content}<end_of_sentence>\n",
        header="<beginning_of_sentence>ai name=assistant\n",
        response="{content}<end_of_sentence>\n",
        system="<beginning_of_sentence>system ai_setting=assistant\n{content}<end_of_sentence>\n",
        default_system=HELPFUL,
        observation="<beginning_of_sentence>tool name=tools\n{content}<end_of_sentence>\n",
        tool_format="minimax1",
        end_of_turn="<end_of_sentence>",
    ),
    "minimax2": Template(
        user="]~b]user\n{content}[e~[\n",
        header="]~b]ai\n",
        response="{content}[e~[\n",
        system="]~b]system\n{content}[e~[\n",
        default_system="You are a helpful assistant. Your name is MiniMax-M2.1 and is built by "
        "MiniMax.",
        prefix="]~!b[",
        observation="\n<response>{content}</response>",
        results="]~b]tool{content}[e~[\n",
        tool_format="minimax2",
        end_of_turn="[e~[",
        thought=THINK,
    ),
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL,
    "mistral": MISTRAL,
    "mistral_small": replace(
        MINISTRAL, system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]", fuses_system=False
    ),
    "mllama": LLAMA3,
    "moonlight": replace(
        KIMI, default_system="You are a helpful assistant provided by Moonshot-AI."
    ),
    "moss_vl": QWEN,
    "olmo": Template(
        user="<|user|>\n{content}",
        header="<|assistant|>\n",
        response="{content}{eos}",
        system="{content}",
        prefix="{eos}",
    ),
    "openchat": Template(
        user="GPT4 Correct User: {content}{eos}",
        header="GPT4 Correct Assistant:",
        response="{content}{eos}",
        system="{content}",
        prefix="{bos}",
    ),
    "openchat-3.6": Template(
        user="<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{content}<|eot_id|>",
        header="<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n",
        response="{content}{eos}",
        system="{content}",
        prefix="{bos}",
        more_stop_words=("<|eot_id|>",),
    ),
    "opencoder": replace(CHATML, default_system="You are OpenCoder, created by OpenCoder Team."),
    "paligemma": Template(
        user="{content}\n",
        header="",
        response="{content}{eos}",
        system="{content}",
        prefix="{bos}",
        fuses_system=True,
    ),
    "paligemma_chat": replace(GEMMA, system="{content}"),
    "phi": PHI,
    "phi4": Template(
        user="<|im_start|>user<|im_sep|>{content}<|im_end|>",
        header="<|im_start|>assistant<|im_sep|>",
        response="{content}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
        end_of_turn="<|im_end|>",
    ),
    "phi4_mini": Template(
        user="<|user|>{content}<|end|>",
        header="<|assistant|>",
        response="{content}<|end|>",
        system="<|system|>{content}<|end|>",
        tool_list="<|tool|>{content}<|/tool|>",
        end_of_turn="<|end|>",
    ),
    "phi_small": replace(PHI, prefix="<|endoftext|>"),
    "pixtral": MINISTRAL,
    "qwen": replace(
        QWEN,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen2_audio": MINICPM_V,
    "qwen2_omni": QWEN2_VL,
    "qwen2_vl": QWEN2_VL,
    "qwen3": QWEN3,
    "qwen3_5": QWEN3_5,
    "qwen3_5_nothink": replace(QWEN3_5, thought=None),
    "qwen3_6": QWEN3_5,
    "qwen3_nothink": QWEN,
    "qwen3_omni": QWEN3,
    "qwen3_omni_nothink": QWEN,
    "qwen3_vl": QWEN3,
    "qwen3_vl_nothink": QWEN,
    "sailor": replace(
        PLAIN_CHATML,
        user="<|im_start|>question\n{content}<|im_end|>\n",
        header="<|im_start|>answer\n",
        default_system="You are an AI assistant named Sailor created by Sea AI Lab. Your answer "
        "should be friendly, unbiased, faithful, informative and detailed.",
    ),
    "seed_coder": replace(
        SEED,
        default_system="You are an AI programming assistant, utilizing the Seed-Coder model, "
        "developed by ByteDance Seed, and you only answer questions related to computer science. "
        "For politically sensitive questions, security and privacy issues, and other non-computer "
        "science questions, you will refuse to answer.\n\n",
    ),
    "seed_oss": replace(
        SEED,
        observation="{bos}tool\n{content}{eos}",
        tool_format="seed_oss",
        strip="responses",
        thought=("<seed:think>", "</seed:think>\n"),
    ),
    "smollm": PLAIN_CHATML,
    "smollm2": replace(
        PLAIN_CHATML,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    "solar": Template(
        user="### User:\n{content}\n\n",
        header="### Assistant:\n",
        response="{content}",
        system="### System:\n{content}\n\n",
        efficient_eos=True,
    ),
    "starchat": Template(
        user="<|user|>\n{content}<|end|>\n",
        header="<|assistant|>",
        response="{content}<|end|>\n",
        system="<|system|>\n{content}<|end|>\n",
        end_of_turn="<|end|>",
    ),
    "telechat2": Template(
        user="<_user>{content}",
        header="<_bot>",
        response="{content}{eos}",
        system="<_system>{content}",
        default_system="你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司"
        "和中国电信人工智能研究院（TeleAI）研发的人工智能助手。",
    ),
    "vicuna": VICUNA,
    "video_llava": VICUNA,
    "xuanyuan": Template(
        user="Human: {content} ",
        header="Assistant:",
        response="{content}{eos}",
        system="{content}",
        default_system="以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant"
        "开头，会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、不安全、"
        "有争议、政治敏感等相关的话题、问题和指示。\n",
    ),
    "yi": PLAIN_CHATML,
    "yi_vl": Template(
        user="### Human: {content}\n",
        header="### Assistant:",
        response="{content}\n",
        system="{content}",
        default_system="This is a chat between an inquisitive human and an AI assistant. Assume "
        "the role of the AI assistant. Read all the images carefully, and respond to the human's "
        "questions with informative, helpful, detailed and polite answers. 这是一个好奇的人类和一个"
        "人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像，并对人类的问题做出信息"
        "丰富、有帮助、详细的和礼貌的回答。\n\n",
        efficient_eos=True,
        more_stop_words=("###",),
    ),
    "youtu": Template(
        user="<|User|>{content}",
        header="<|Assistant|>",
        response="{content}<|end_of_text|>",
        system="{content}",
        observation="<tool_response>\n{content}\n</tool_response>",
        prefix="{bos}",
        end_of_turn="<|end_of_text|>",
        thought=THINK,
    ),
    "youtu_vl": Template(
        user="<|begin_of_text|>user\n{content}<|end_of_text|>\n",
        header="<|begin_of_text|>assistant\n",
        response="{content}<|end_of_text|>\n",
        system="<|begin_of_text|>system\n{content}<|end_of_text|>\n",
        default_system=HELPFUL,
        end_of_turn="<|end_of_text|>",
    ),
    "yuan": Template(
        user="{content}<sep>",
        header="",
        response="{content}<eod>\n",
        system="{content}",
        end_of_turn="<eod>",
    ),
    "zephyr": Template(
        user="<|user|>\n{content}{eos}",
        header="<|assistant|>\n",
        response="{content}{eos}",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}

# Where a template writes other text than LLaMA-Factory's of the same name, as its model does.
_GLM_THOUGHT = (
    "A thought and the response are in the model's order (LLaMA-Factory writes the line break of "
    "the response behind an empty thought)."
)
_GLM_TOOLS = (
    "Calls end with </tool_call>, results stand in <tool_response>, tools stand in a system "
    "message of their own before the user's."
)
_PAST = "Earlier responses without their thoughts begin with an empty one."
_TRIMMED = "Blanks around messages are taken away."
_GEMMA4 = (
    "No default system message: <|think|> alone where thinking is on. Calls stand by themselves "
    "and end the turn, each tool is declared between <|tool> and <tool|>, arguments in the order "
    f"of their names. {_TRIMMED}"
)
_LFM2 = "Begins with the begin token; tools stand on a line of their own."

DIFFERENCES: dict[str, str] = {
    "aeva": f"As glm4_7. {_GLM_TOOLS}",
    "bailing_v2": "Tools begin on a new line after the system message.",
    "ernie_vl": "A thought stands after the assistant's name, where generation writes it.",
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3n", "paligemma_chat"), _TRIMMED),
    **dict.fromkeys(("gemma4", "gemma4n"), _GEMMA4),
    **dict.fromkeys(("glmz1", "glm4v"), _GLM_THOUGHT),
    "glm4_5v": f"As glm4_moe. {_GLM_TOOLS}",
    "glm4_7": "No line breaks after the names of roles, nor around thoughts, of which an empty one "
    f"is </think>. {_GLM_TOOLS}",
    "glm4_moe": f"Thoughts stand on one line: <think>...</think>. {_PAST} Where thinking is off, "
    f"/nothink follows the user's words. {_GLM_TOOLS}",
    "gpt_oss": "Responses name their channel (final) whether or not they have a thought, and "
    "earlier ones end with <|end|>.",
    "granite4": "Results of tools stand in <tool_response> of a user message (LLaMA-Factory's "
    "header of the response after them lacks <|end_of_role|>).",
    "lfm2": f"No default system message. {_LFM2}",
    "lfm2_vl": _LFM2,
    **dict.fromkeys(("llama3", "llama4", "mllama", "llava_next_llama3"), _TRIMMED),
    "minimax2": "Calls stand in <minimax:tool_call>, as the text about tools says.",
    **dict.fromkeys(
        (
            "mistral",
            "ministral",
            "ministral3",
            "mistral_small",
            "pixtral",
            "llava_next_mistral",
            "llava_next_video_mistral",
        ),
        "Tools stand before the first user message, not inside it.",
    ),
    "phi_small": "Begins with <|endoftext|>.",
    "seed_oss": "A thought ends its line; calls begin after the header at once and their function "
    "tag is closed; results are from tool. Without a system message, tools stand in one of "
    "the model's own.",
    "smollm2": "The default system message has no full stop at its end.",
    "youtu": "A response that calls tools ends as others do.",
}

# Names for which neither LLaMA-Factory's text nor the model's own could be had to compare with.
UNVERIFIED: tuple[str, ...] = ("custom", "hy_dense_1_8b")
