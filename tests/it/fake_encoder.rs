//! An encoder without weights: a text's vector is a hash of its tokens, whatever is encoded beside it.

use obol_models::batch::ForwardError;
use obol_models::encoder::TextEncoder;

pub(crate) const WIDTH: usize = 3;
pub(crate) const TEXT_TOKENS: usize = 20;

/// What a step's texts are shown to.
type OnStep = dyn FnMut(&[&[u32]]) + Send;

/// See the module's head.
pub(crate) struct FakeEncoder {
    /// Called with each step's texts before they are encoded.
    on_step: Box<OnStep>,
    /// The n-th step (from 1) fails, or panics.
    pub(crate) fail_at: Option<u64>,
    pub(crate) panic_at: Option<u64>,
    steps: u64,
}

impl FakeEncoder {
    pub(crate) fn new(on_step: impl FnMut(&[&[u32]]) + Send + 'static) -> Self {
        Self { on_step: Box::new(on_step), fail_at: None, panic_at: None, steps: 0 }
    }
}

/// What a text must become.
pub(crate) fn encoded(text: &[u32]) -> Vec<f32> {
    let hash = blake3::hash(bytemuck::cast_slice(text));
    let values: Vec<f32> = hash.as_bytes()[..WIDTH].iter().map(|byte| f32::from(*byte) + 1.0).collect();
    let length = values.iter().map(|value| value * value).sum::<f32>().sqrt();
    values.into_iter().map(|value| value / length).collect()
}

impl TextEncoder for FakeEncoder {
    fn width(&self) -> usize {
        WIDTH
    }

    fn context_length(&self) -> usize {
        TEXT_TOKENS
    }

    fn encode(
        &mut self,
        texts: &[&[u32]],
        meanwhile: &mut dyn FnMut(),
        vectors: &mut Vec<Vec<f32>>,
    ) -> Result<(), ForwardError> {
        self.steps += 1;
        meanwhile();
        (self.on_step)(texts);
        assert!(self.panic_at != Some(self.steps), "the fake encoder panics, as it was told to");
        if self.fail_at == Some(self.steps) {
            return Err(ForwardError("the fake encoder fails, as it was told to".into()));
        }
        vectors.extend(texts.iter().map(|text| encoded(text)));
        Ok(())
    }
}
