//! What the store keeps, and what it says about what it cannot.

mod store_common;

use std::path::Path;
use store_common::{migration, operation, owned, pmu, vm};
use vpmu_proto::api::VcpuPmu;
use vpmu_proto::api::migration::State;
use vpmu_server::store::{
    Batch, Health, MIGRATION_HISTORY, OPERATION_HISTORY, PMU_HISTORY, Store, StoreError,
};

fn open(dir: &Path) -> Store {
    Store::open(dir).expect("the store opens")
}

#[tokio::test]
async fn everything_reads_back_after_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (id, term) = (store.store_id().to_owned(), store.term());
    assert_eq!(term, 1);
    store.append_ownership(owned("a", 1, 3)).await.unwrap();
    let batch =
        Batch::new().put_vm(vm("a", "1")).unwrap().put_migration(&migration("a", "m", 5, State::Precopy));
    store.commit(batch.unwrap().put_operation(&operation("o", 9, false)).unwrap()).await.unwrap();
    store.put_pmu(&[pmu("a", 0, 100), pmu("a", 1, 200)]).await.unwrap();
    let before = (store.list_vms(), store.get_pmu("a"), store.list_migrations("a"), store.list_operations());
    assert_eq!(before.0[0].vm.as_ref().map(|v| (v.epoch, v.incarnation)), Some((1, 3)));
    assert_eq!(store.health(), Health::Serving);
    drop(store);

    let store = open(dir.path());
    assert_eq!((store.store_id(), store.term()), (id.as_str(), 2));
    let after = (store.list_vms(), store.get_pmu("a"), store.list_migrations("a"), store.list_operations());
    assert_eq!(before, after);
    assert_eq!(store.operation_by_request("request-o"), store.get_operation("operations/o"));
    assert_eq!(store.ownership("a").map(|r| (r.epoch, r.lsn)), Some((1, 1)));
    assert!(store.damaged().is_empty() && store.journal_recovery().whole);
    store.delete_vm("a").await.unwrap();
    store.close().await;
    assert_eq!(store.put_vm(vm("a", "2")).await, Err(StoreError::Closed));

    let store = open(dir.path());
    assert!(
        store.list_vms().is_empty() && store.get_pmu("a").is_empty() && store.list_migrations("a").is_empty()
    );
    assert!(store.damaged().is_empty());
}

#[tokio::test]
async fn histories_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for value in 0..20 {
        store.put_pmu(&[pmu("a", 0, value), pmu("a", 1, value)]).await.unwrap();
    }
    let mut batch = Batch::new();
    let last = MIGRATION_HISTORY + 10;
    for n in 0..last {
        // The first one is still open and must outlive younger ones that ended.
        let state = if n == 0 { State::InDoubt } else { State::Succeeded };
        batch = batch.put_migration(&migration("a", &format!("m{n}"), n as u64, state)).unwrap();
    }
    for n in 0..OPERATION_HISTORY + 50 {
        batch = batch.put_operation(&operation(&format!("o{n}"), n as u64, n != 0)).unwrap();
    }
    store.commit(batch).await.unwrap();
    for store in [store.clone(), {
        store.close().await;
        open(dir.path())
    }] {
        assert_eq!(store.list_operations().len(), OPERATION_HISTORY);
        assert!(store.get_operation("o0").is_some(), "an unfinished operation is not pruned");
        assert!(store.get_operation("o1").is_none() && store.operation_by_request("request-o1").is_none());
        let migrations = store.list_migrations("a");
        assert_eq!(migrations.len(), MIGRATION_HISTORY);
        assert!(store.get_migration("a", "m0").is_some() && store.get_migration("a", "m1").is_none());
        assert_eq!(
            migrations[0].migration.as_ref().map(|m| m.create_time.unwrap().seconds),
            i64::try_from(last - 1).ok()
        );
        assert_eq!(store.get_vcpu_pmu("a", 1).unwrap().image.unwrap().pmis, 19);
    }
    let store = open_after_drop(store, dir.path());
    let history = store.pmu_history("a", 0).await.unwrap();
    let values: Vec<_> = history.iter().map(|r| r.image.as_ref().unwrap().pmis).collect();
    assert_eq!(values, (12..20).rev().collect::<Vec<_>>());
    assert_eq!(history.len(), PMU_HISTORY);
    assert!(history.windows(2).all(|w| w[0].sequence > w[1].sequence));
}

fn open_after_drop(store: Store, dir: &Path) -> Store {
    drop(store);
    open(dir)
}

#[tokio::test]
async fn unfinished_operations_are_bounded_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut batch = Batch::new();
    for n in 0..OPERATION_HISTORY {
        batch = batch.put_operation(&operation(&format!("o{n}"), n as u64, false)).unwrap();
    }
    store.commit(batch).await.unwrap();
    let refused = store.put_operation(&operation("more", 1, false)).await.unwrap_err();
    assert_eq!(refused.reason(), "OPERATIONS_FULL");
    store.put_operation(&operation("o7", 7, true)).await.unwrap();
    store.put_operation(&operation("more", 1, false)).await.unwrap();
    assert!(store.get_operation("o7").is_none());
}

#[tokio::test]
async fn large_records_go_in_parts_and_too_large_ones_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let with_vcpus = |n: u32, text: usize| {
        let mut record = migration("a", "m", 1, State::Succeeded);
        let one = |vcpu| VcpuPmu { vcpu, digest: "x".repeat(text), ..VcpuPmu::default() };
        let result =
            vpmu_proto::api::MigrationResult { pmu_at_stop: (0..n).map(one).collect(), ..Default::default() };
        record.migration.as_mut().unwrap().result = Some(result);
        record
    };
    let large = with_vcpus(256, 1000);
    store.put_migration(&large).await.unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.get_migration("a", "m"), Some(large));
    let small = with_vcpus(1, 10);
    store.put_migration(&small).await.unwrap();
    let refused = store.put_migration(&with_vcpus(256, 5000)).await.unwrap_err();
    assert!(matches!(&refused, StoreError::TooLarge { key, .. } if key == "mig/a/m"), "{refused}");
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.get_migration("a", "m"), Some(small));
    assert!(store.damaged().is_empty(), "{:?}", store.damaged());
}

#[tokio::test]
async fn bad_keys_are_refused_by_field() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for uid in ["", "a/b", "a\0", &"x".repeat(200), "é"] {
        let refused = store.put_vm(vm(uid, "1")).await.unwrap_err();
        assert!(matches!(refused, StoreError::BadField { field: "vm.uid", .. }), "{uid:?}: {refused}");
    }
    let mut record = pmu("a", 0, 1);
    record.image = None;
    assert!(matches!(store.put_pmu(&[record]).await, Err(StoreError::BadField { field: "image", .. })));
    assert!(store.list_vms().is_empty());
}

#[tokio::test]
async fn damaged_records_are_named_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let batch = Batch::new().put_vm(vm("a", "1")).unwrap().put_vm(vm("b", "1")).unwrap();
    store.commit(batch.put_operation(&operation("o", 1, false)).unwrap()).await.unwrap();
    store.put_pmu(&[pmu("a", 3, 1)]).await.unwrap();
    store.close().await;
    drop(store);

    let damaged_value = {
        let db = sled::open(dir.path().join("sled")).unwrap();
        let (key, mut value) = db.iter().map(Result::unwrap).find(|(k, _)| k.starts_with(b"vm/a")).unwrap();
        let last = value.len() - 1;
        value[last] ^= 0x10;
        db.insert(&key, &value).unwrap();
        let (key, mut newer) = db.iter().map(Result::unwrap).find(|(k, _)| k.starts_with(b"pmu/a")).unwrap();
        newer[4] = 2;
        db.insert(&key, &newer).unwrap();
        db.insert(b"what is this", b"?").unwrap();
        db.flush().unwrap();
        value
    };

    let store = open(dir.path());
    let keys: Vec<_> = store.damaged().into_iter().map(|d| d.key).collect();
    assert!(keys.contains(&"vm/a".to_owned()) && keys.iter().any(|k| k.starts_with("pmu/a/3/")), "{keys:?}");
    assert_eq!(keys.len(), 3);
    assert!(store.get_vm("a").is_none() && store.get_vm("b").is_some() && store.get_operation("o").is_some());
    store.put_vm(vm("c", "1")).await.unwrap();
    store.close().await;
    drop(store);
    let db = sled::open(dir.path().join("sled")).unwrap();
    assert_eq!(db.get(b"vm/a\0\0").unwrap().unwrap(), damaged_value);
}

#[tokio::test]
async fn a_damaged_host_record_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let db = sled::open(dir.path().join("sled")).unwrap();
    db.insert(b"host\0\0", b"VPMUxxxxxxxxxxxxxxxxxxx").unwrap();
    db.flush().unwrap();
    drop(db);
    // Waits for what sled's pool still holds.
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(&error, StoreError::Corrupt { message, .. } if message.contains("host")), "{error}");
}

#[test]
fn garbage_in_sled_is_an_error_not_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    std::fs::write(dir.path().join("sled/conf"), b"no such thing").unwrap();
    assert_eq!(Store::open(dir.path()).unwrap_err().reason(), "STORE_CORRUPT");
}

#[tokio::test]
async fn epochs_in_sled_ahead_of_the_journal_make_a_machine_uncertain() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.append_ownership(owned("a", 4, 1)).await.unwrap();
    store.append_ownership(owned("b", 1, 1)).await.unwrap();
    store.commit(Batch::new().put_vm(vm("a", "1")).unwrap().put_vm(vm("b", "1")).unwrap()).await.unwrap();
    store.close().await;
    drop(store);
    for entry in std::fs::read_dir(dir.path().join("journal")).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let store = open(dir.path());
    let held = store.ownership("a").unwrap();
    assert_eq!((held.phase().as_str_name(), held.epoch), ("UNCERTAIN", 4));
    assert_eq!(store.append_ownership(owned("a", 5, 1)).await.unwrap_err().reason(), "OWNERSHIP_STEP");
    store.append_ownership(owned("a", 6, 1)).await.unwrap();
    assert_eq!(store.ownership("a").unwrap().phase().as_str_name(), "OWNED");
}
