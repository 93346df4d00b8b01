//! An error, flat.

use crate::error::{ClientError, code_name};
use serde::Serialize;
use std::collections::BTreeMap;

/// What is printed on standard error, below the key `error`, with `--output json`.
#[derive(Clone, Debug, Serialize)]
pub struct ErrorView {
    /// The gRPC code's name.
    pub code: String,
    /// Stable reason.
    pub reason: String,
    /// In words.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// What was wrong with each field.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub violations: Vec<ViolationView>,
    /// Further facts from the server.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// One field or precondition.
#[derive(Clone, Debug, Serialize)]
pub struct ViolationView {
    /// The field's path.
    pub field: String,
    /// What is wrong, with the value.
    pub description: String,
}

impl From<&ClientError> for ErrorView {
    fn from(error: &ClientError) -> Self {
        let refusal = error.refusal();
        Self {
            code: code_name(error.code()).to_owned(),
            reason: error.reason().to_owned(),
            message: error.to_string(),
            remedy: error.remedy(),
            violations: refusal
                .map(|refusal| {
                    refusal
                        .violations
                        .iter()
                        .map(|v| ViolationView { field: v.field.clone(), description: v.description.clone() })
                        .collect()
                })
                .unwrap_or_default(),
            metadata: refusal.map(|refusal| refusal.metadata.iter().cloned().collect()).unwrap_or_default(),
        }
    }
}
