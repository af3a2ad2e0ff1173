"""Chat templates as models of the hub have them: one for each way of writing them."""

from __future__ import annotations

from typing import Any

__all__ = ["CONVERSATIONS", "SNIPPETS", "SPECIAL", "TEMPLATES", "TOOLS"]

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

_CHATML = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA_2 = """
{%- set system_message = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set loop_messages = messages[1:] -%}
    {%- set system_message = '<<SYS>>\\n' ~ messages[0]['content'] | trim ~ '\\n<</SYS>>\\n\\n' -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set content = system_message + message['content'] if loop.first else message['content'] -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

_LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = '26 Jul 2024' if strftime_now is not defined else '21 Nov 2026' %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == 'tool' or (message.tool_calls is defined and message.tool_calls)) %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('After the optional system message, roles must alternate') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == user_messages[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {%- for key, val in tool.function.items() if key != 'return' %}
                    {{- '"' + key + '": ' + (val | tojson) }}{{ ', ' if not loop.last }}
                {%- endfor %}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
"""

_QWEN_3 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string
        and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content =
                content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set tool_call = tool_call.function or tool_call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string
                else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

_GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

_ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

_TRAINED = """{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
            {% set end = eos_token %}
{{ message.content }}{{ end }}
        {% endgeneration %}
    {% else %}
{{ message.role }}: {{ message.content }}
        {% if message.content == 'stop' %}{% break %}{% endif %}
    {% endif %}
{% endfor %}
{{ end is defined }}"""

_MACROS = """{%- macro text(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is none or content is undefined -%}
    {%- else -%}
        {%- for part in content if part.type in ('text', 'input_text') -%}
            {{ part.text }}{{ '\\n' if not loop.last }}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{ '<' ~ message.role | upper ~ '>' ~ text(message.content) ~ '\\n' }}
{%- endfor -%}
{%- for tool in tools or [] -%}
    {%- set p = tool.function.parameters -%}
    {{ tool.function.name }}({{ p.properties.keys() | sort | join(', ') }}):
    {{- p.required | tojson }}
{% endfor -%}"""

_COMMAND = """{{ bos_token }}{# A comment. #}
{% set roles = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'} %}
{%- for m in messages recursive %}
{{ '%s|%5d|%-9s|' % (loop.index, m.content | length, roles.get(m.role, '?')) }}
{{- m.content | replace('\\n', ' ') | truncate(40) | e }}
{% else %}
nobody
{%- endfor %}
{{ messages | map(attribute='role') | unique | list }} {{ messages | groupby('role') | length }}"""

_DEEPSEEK = """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}
{% endif %}
{% set ns = namespace(is_first=false, system_prompt='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}
{%- endfor %}
{{bos_token}}{{ns.system_prompt}}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{'<|User|>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{% set content = message['content'] %}
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{'<|Assistant|>' + content + '<|end▁of▁sentence|>'}}
{%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{% endif %}"""

_DOCUMENTS = """{% if documents %}{% for d in documents %}
Document: {{ loop.index0 }} {{ d.title }}
{{ d.text }}
{% endfor %}{% else %}no documents{% endif %}
{%- filter upper %}{{ messages[-1].content }}{% endfilter %}
{% call(x) (dict(a=1, b=2)).items() %}{{ x }}{% endcall %}"""

TEMPLATES = {
    "chatml": _CHATML,
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "mistral": _MISTRAL,
    "qwen-3": _QWEN_3,
    "gemma": _GEMMA,
    "zephyr": _ZEPHYR,
    "trained": _TRAINED,
    "macros": _MACROS,
    "command": _COMMAND,
    "deepseek": _DEEPSEEK,
    "documents": _DOCUMENTS,
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says <what> the weather is & will be in 'Köln' or \"東京\".",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def _said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": _said(("user", "Hello!")),
    "system": _said(
        ("system", " Be brief.\n"), ("user", "Hi <b>&amp;</b>"), ("assistant", "Yes. ")
    ),
    "long": _said(
        *[("user", "What's up?\n\n"), ("assistant", "<think>\nHm\n</think>\n\nÜber 🌱")] * 5
    ),
    "alternating": _said(("user", "a"), ("user", "b")),
    "stop": _said(("user", "stop"), ("assistant", "never said")),
    "parts": _said(
        ("system", [{"type": "text", "text": "Look."}]),
        ("user", [{"type": "image"}, {"type": "text", "text": " What is it? "}]),
    ),
    "reasoning": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "\nBecause\n"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, "é"]}}}
            ],
        },
        {"role": "tool", "content": '{"t": 3}'},
        {"role": "tool", "content": "cold"},
    ],
    "unknown": _said(("critic", "no"), ("user", "")),
}

SNIPPETS = [
    "  {% if true %}\n  x\n  {% endif %}\n  y\n",
    "a\r\nb\rc\n\n",
    "{{ none }}|{{ missing }}|{{ missing is defined }}|{{ true }}|{{ 1.0 }}|{{ 1e100 }}",
    "{{ data | tojson }}{{ data | tojson(indent=2) }}{{ data | tojson(sort_keys=true) }}",
    "{{ data | tojson(ensure_ascii=true) }}{{ data | tojson(separators=(',', ':')) }}",
    "{{ missing | tojson }}",
    "{{ '<b>&' | tojson }}{{ '<b>&' | e }}{{ '<b>&' | safe }}{{ '%s' | format('<') }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1] %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{% generation %}",
    "{% set x %}block{% endset %}{{ x ~ x | length }}",
    "{% set ns = namespace(self=1, a=2) %}{% set ns.b = 3 %}{{ ns.self + ns.a + ns.b }}",
    "{% set ns = namespace({'a': 1}) %}{{ ns.a }}{{ ns.c is defined }}",
    "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ dict(a=1, **data) }}{{ dict.fromkeys('ab', 1) }}{{ dict([('x', 1)]) }}",
    "{{ dict.mro }}",
    "{{ dict.items(data) | list }}",
    "{{ dict.__class__ }}",
    "{{ ''.__class__ }}",
    "{{ '' | attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ data.pop('list') }}",
    "{{ data.list.append(1) }}",
    "{{ data.update({}) }}",
    "{{ data['list'] | sum }} {{ data.items() | list }} {{ data.keys }}",
    "{{ range(1000000) }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ messages[3] }}",
    "{{ messages[3].content }}",
    "{{ raise_exception() }}",
    "{{ raise_exception(data) }}",
    "{{ raise_exception('') }}",
    "{% include 'other' %}",
    "{% trans %}x{% endtrans %}",
    "{% do data %}",
    "{{ x | nosuch }}",
    "{{ x is nosuch }}",
    "{% if %}",
    "{{ 'x' * 3 }}{{ [1] * 2 }}{{ 7 // 2 }}{{ -7 % 3 }}{{ 2 ** 10 }}",
    "{{ 'a' in 'abc' }}{{ 'a' ~ 1 }}{{ data.z[1:-1] }}{{ [1, 2, 3][::-1] }}",
    "{{ 'a b  c'.split() }}{{ 'äß'.upper() }}{{ 'x' | center(5) }}{{ [3, 1] | sort }}",
    "{{ data | pprint }}{{ 'a b c' | wordwrap(1) }}{{ data | xmlattr }}{{ 'a/b?' | urlencode }}",
    "{{ 'ab' | first }}{{ [1, 2, 3] | batch(2) | list }}{{ '3' | int + '2.5' | float }}",
    "{% raw %}{{ x }}{% endraw %}{# c #}{{ '\\u00e9\\n' }}{{ \"\\x41\" }}",
    "{% set messages = [] %}{{ messages }}{{ loop is defined }}{{ tools }}{{ documents }}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}"
    "{{ m(1, 2, 3, c=4) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set é = 'ü' %}{{ é }}",
]
"""What templates are made of, and what they may not do."""
