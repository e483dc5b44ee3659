//! A vocabulary of bytes, so that any text is a prompt and any token is text, and a template to go with it.

use obol_models::chat_template::ChatTemplate;
use obol_models::tokenizer::{TokenKind, Tokenizer, Vocabulary};

/// Each byte's token, in the byte alphabet of GPT-2: what has no glyph is moved past 255.
pub(crate) fn bytes() -> Vec<String> {
    let mut moved = 256;
    let mut token = |byte| {
        let shown = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if shown { byte } else { moved };
        moved += u32::from(!shown);
        char::from_u32(code).expect("a character").to_string()
    };
    (0..=255_u32).map(&mut token).collect()
}

/// Token id = byte; the ids from 256 on are control tokens.
pub(crate) fn tokenizer() -> Tokenizer {
    let mut tokens = bytes();
    let mut kinds = vec![TokenKind::Normal; 256];
    for control in ["<|im_start|>", "<|im_end|>"] {
        tokens.push(control.to_owned());
        kinds.push(TokenKind::Control);
    }
    let vocabulary = Vocabulary { tokens, kinds, pre: "gpt-2".to_owned(), ..Vocabulary::default() };
    Tokenizer::new(&vocabulary).expect("a whole vocabulary")
}

pub(crate) fn template() -> ChatTemplate {
    ChatTemplate::new(SOURCE, "", "").expect("a good template")
}

/// Of a model that thinks first: its prompts end within a thought.
pub(crate) fn thinking_template() -> ChatTemplate {
    let thinks =
        "{% if enable_thinking is undefined or enable_thinking %}<think>\n{% else %}</think>{% endif %}";
    ChatTemplate::new(&format!("{SOURCE}{thinks}"), "", "").expect("a good template")
}

const SOURCE: &str = "{% for m in messages %}{% if m.content == 'raise' %}\
        {{ raise_exception('no such tool') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}\
        {% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
