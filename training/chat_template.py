"""The chat template of the bundled checkpoint: ChatML with vision parts, and calls of tools as Qwen2.5 writes them.

A tool is listed as one line, `move_to(shape: string, color?: string (its color)): Move to a shape.`: a JSON schema
would be long for a model of this size. Calls and results are those of the hermes form:
https://qwen.readthedocs.io/en/latest/framework/function_call.html
"""

CHAT_TEMPLATE = """\
{%- macro write(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro list(tool) -%}
    {%- set parameters = tool.parameters or {} -%}
    {{- '\\n' + tool.name + '(' -}}
    {%- for name, value in (parameters.properties or {}).items() -%}
        {{- ('' if loop.first else ', ') + name + ('' if name in (parameters.required or []) else '?') -}}
        {{- ': ' + value.type if value.type is string else '' -}}
        {{- ' (' + value.description + ')' if value.description else '' -}}
    {%- endfor -%}
    {{- ')' + (': ' + tool.description if tool.description else '') -}}
{%- endmacro -%}
{%- macro call(tool) -%}
    {{- '<tool_call>\\n{"name": ' + tool.name | tojson + ', "arguments": ' -}}
    {{- tool.arguments if tool.arguments is string else tool.arguments | tojson -}}
    {{- '}\\n</tool_call>' -}}
{%- endmacro -%}
{%- set given = messages and messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + (write(messages[0].content) if given else 'You are a helpful assistant.') -}}
{%- if tools -%}
    {{- '\\n\\n# Tools\\n<tools>' -}}
    {%- for tool in tools -%}
        {{- list(tool.function or tool) -}}
    {%- endfor -%}
    {{- '\\n</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' + write(message.content) + '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- elif not (loop.first and given) -%}
        {{- '<|im_start|>' + message.role + '\\n' + write(message.content) -}}
        {%- for tool in message.tool_calls or [] -%}
            {{- '' if loop.first and not message.content else '\\n' -}}
            {{- call(tool.function or tool) -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
