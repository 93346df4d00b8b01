//! Typed methods of `google.longrunning.Operations`.

use crate::client::Client;
use crate::error::ClientError;
use crate::names;
use vpmu_proto::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest, Operation,
};

impl Client {
    /// Gets the latest state of an operation.
    pub async fn get_operation(&self, name: &str) -> Result<Operation, ClientError> {
        let request = self.request(GetOperationRequest { name: names::operation(name) });
        self.call("GetOperation", self.raw_operations().get_operation(request)).await
    }

    /// Lists operations, newest first.
    pub async fn list_operations(&self) -> Result<Vec<Operation>, ClientError> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request =
                self.request(ListOperationsRequest { page_token, ..ListOperationsRequest::default() });
            let page = self.call("ListOperations", self.raw_operations().list_operations(request)).await?;
            all.extend(page.operations);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Asks for a running operation to be cancelled.
    pub async fn cancel_operation(&self, name: &str) -> Result<(), ClientError> {
        let request = self.request(CancelOperationRequest { name: names::operation(name) });
        self.call("CancelOperation", self.raw_operations().cancel_operation(request)).await
    }

    /// Deletes the record of a finished operation.
    pub async fn delete_operation(&self, name: &str) -> Result<(), ClientError> {
        let request = self.request(DeleteOperationRequest { name: names::operation(name) });
        self.call("DeleteOperation", self.raw_operations().delete_operation(request)).await
    }
}
