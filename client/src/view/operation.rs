//! A long-running operation, flat, with its metadata and response decoded where their types are known.

use super::{ErrorView, MigrationView, VmView, time};
use crate::error::ClientError;
use crate::wait::unpack;
use serde::Serialize;
use serde_json::{Value, json};
use vpmu_proto::api::{Migration, OperationMetadata, VirtualMachine};
use vpmu_proto::longrunning::{Operation, operation};

/// What `operation get --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct OperationView {
    /// operations/{uuid}.
    pub name: String,
    /// It has ended.
    pub done: bool,
    /// Progress.
    pub metadata: Option<Value>,
    /// The failure.
    pub error: Option<ErrorView>,
    /// The result of success.
    pub response: Option<Value>,
}

impl From<&Operation> for OperationView {
    fn from(operation: &Operation) -> Self {
        let (error, response) = match &operation.result {
            None => (None, None),
            Some(operation::Result::Error(status)) => {
                (Some(ErrorView::from(&ClientError::from_operation(status))), None)
            }
            Some(operation::Result::Response(any)) => (None, Some(decode(any))),
        };
        Self {
            name: operation.name.clone(),
            done: operation.done,
            metadata: operation.metadata.as_ref().map(decode),
            error,
            response,
        }
    }
}

fn decode(any: &prost_types::Any) -> Value {
    let unknown = || json!({ "type": any.type_url });
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        "vpmu.v1.VirtualMachine" => unpack::<VirtualMachine>(any)
            .ok()
            .and_then(|vm| serde_json::to_value(VmView::from(&vm)).ok())
            .unwrap_or_else(unknown),
        "vpmu.v1.Migration" => unpack::<Migration>(any)
            .ok()
            .and_then(|migration| serde_json::to_value(MigrationView::from(&migration)).ok())
            .unwrap_or_else(unknown),
        "vpmu.v1.OperationMetadata" => unpack::<OperationMetadata>(any).map_or_else(
            |_| unknown(),
            |metadata| {
                json!({
                    "target": metadata.target,
                    "verb": metadata.verb,
                    "create_time": time(metadata.create_time.as_ref()),
                    "end_time": time(metadata.end_time.as_ref()),
                })
            },
        ),
        "google.protobuf.Empty" => json!({}),
        _ => unknown(),
    }
}
