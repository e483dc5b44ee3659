//! What is wrong with a safetensors file that its reader refused: the tensor and the numbers, which the
//! reader's own errors do not have.

use std::collections::BTreeMap;

use safetensors::SafeTensorError;
use safetensors::tensor::TensorInfo;

/// Tells in words why `file` was refused with `error`.
pub(crate) fn problem(file: &[u8], error: &SafeTensorError) -> String {
    let total = file.len();
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return format!("it has {total} bytes, too few for a header");
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length));
    let Some(header) = header else {
        return format!("its header should have {length} bytes, but the file has {total}");
    };
    match error {
        SafeTensorError::HeaderTooLarge => format!("its header has {length} bytes, more than are read"),
        SafeTensorError::InvalidHeader(why) => format!("its header is not UTF-8: {why}"),
        SafeTensorError::InvalidHeaderDeserialization(why) => format!("its header cannot be read: {why}"),
        SafeTensorError::InvalidOffset(name) => {
            format!("the data of tensor `{name}` does not begin where the tensor before it ends")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            let ends = tensors(header).into_values().map(|info| info.data_offsets.1);
            let needed = ends.max().unwrap_or(0).saturating_add(header.len() + 8);
            format!("its tensors end at byte {needed} but the file has {total}")
        }
        other => match tensors(header).iter().find(|(_, info)| !fits(info)) {
            Some((name, info)) => format!(
                "tensor `{name}` of type {:?} and shape {:?} does not fill bytes {} to {} of the data",
                info.dtype, info.shape, info.data_offsets.0, info.data_offsets.1
            ),
            None => other.to_string(),
        },
    }
}

/// All entries of the header but the file's own metadata.
fn tensors(header: &[u8]) -> BTreeMap<String, TensorInfo> {
    let values: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).unwrap_or_default();
    values.into_iter().filter_map(|(name, value)| Some((name, serde_json::from_value(value).ok()?))).collect()
}

fn fits(info: &TensorInfo) -> bool {
    let values = info.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let bits = values.and_then(|values| values.checked_mul(info.dtype.bitsize()));
    let bytes = info.data_offsets.1.checked_sub(info.data_offsets.0);
    bits.zip(bytes).is_some_and(|(bits, bytes)| bits.is_multiple_of(8) && bits / 8 == bytes)
}
