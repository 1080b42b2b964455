"""Chat templates that know tools, each in the manner of a family of models."""

# Qwen2.5 and the Hermes models, shortened.
HERMES = r"""
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}

# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{%- if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# A list of calls behind one mark, as Mistral's models write it; here without ids, and the mark is text.
LIST = """
{%- if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]
{%- elif m.tool_calls %}[CALLS][
{%- for call in m.tool_calls %}{{ ', ' if not loop.first }}{"name": "{{ call.function.name }}", "arguments": {{''
}}{{ call.function.arguments | tojson }}}{% endfor %}]<|im_end|>
{%- else %}{{ m.content }}<|im_end|>{% endif %}
{%- endfor %}"""

# The function's name outside of the JSON, and an empty thought before every answer, as Qwen3 has it.
TAGGED = """
{%- for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.parameters | tojson }}
{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}A:<think>

</think>

{{ m.content }}
{%- for call in m.tool_calls or [] %}<function={{ call.function.name }}>
{{- call.function.arguments | tojson }}</function>{% endfor %}<|im_end|>
{%- else %}{{ m.role }}:{{ m.content }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}A:{% endif %}"""
