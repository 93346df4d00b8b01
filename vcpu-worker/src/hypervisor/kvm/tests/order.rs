//! State pieces are set in one order, however they arrive, and a list that is not whole is refused before anything is set.

use super::*;

const DEADLINE_MSR: u32 = 0x6e0;

/// A piece's word of 64 bits for an MSR.
fn msr(pieces: &[StatePiece], index: u32) -> Option<u64> {
    let msrs = &pieces.iter().find(|p| p.kind == "msrs").expect("msrs").data;
    let entry = msrs.chunks_exact(16).find(|e| e[..4] == index.to_le_bytes())?;
    Some(u64::from_le_bytes(entry[8..].try_into().expect("8")))
}

/// A vCPU whose APIC's timer waits for a deadline that is far away.
fn waiting_for_a_deadline() -> Vec<StatePiece> {
    const LVTT: usize = 0x320;
    const FAR: u64 = 1 << 62;
    let memory = memory(2 * MIB);
    let (_vm, mut vcpu) = start(&memory, guest::spin(), EntryMode::LongUser);
    let mut pieces = vcpu.save().expect("saved");
    let piece = |pieces: &mut Vec<StatePiece>, kind: &str| {
        pieces.iter().position(|p| p.kind == kind).unwrap_or_else(|| panic!("{kind}"))
    };
    let lapic = piece(&mut pieces, "lapic");
    // Mode 2, vector 0x20.
    pieces[lapic].data[LVTT..LVTT + 4].copy_from_slice(&0x4_0020u32.to_le_bytes());
    let msrs = piece(&mut pieces, "msrs");
    let entry = pieces[msrs].data.chunks_exact_mut(16).find(|e| e[..4] == DEADLINE_MSR.to_le_bytes());
    entry.expect("KVM lists it")[8..].copy_from_slice(&FAR.to_le_bytes());
    pieces
}

#[test]
fn pieces_are_set_in_their_order_however_they_arrive() {
    if !require_kvm() {
        return;
    }
    let good = waiting_for_a_deadline();
    let kinds: Vec<&str> = good.iter().map(|p| p.kind.as_str()).collect();
    let mut reversed = good.clone();
    reversed.reverse();
    let mut rotated = good.clone();
    rotated.rotate_left(5);
    for pieces in [&good, &reversed, &rotated] {
        let memory = memory(2 * MIB);
        let (_vm, mut vcpu) = start(&memory, guest::spin(), EntryMode::LongUser);
        vcpu.restore(pieces).expect("whole");
        let back = vcpu.save().expect("saved");
        assert_eq!(back.iter().map(|p| p.kind.as_str()).collect::<Vec<_>>(), kinds);
        // Set before the timer's mode it would be lost, and the guest's timer with it.
        assert_eq!(msr(&back, DEADLINE_MSR), msr(&good, DEADLINE_MSR));
        for (back, good) in
            back.iter().zip(&good).filter(|(p, _)| !["tsc", "lapic"].contains(&p.kind.as_str()))
        {
            assert!(back == good, "{}", back.kind);
        }
    }
}

#[test]
fn a_list_that_is_not_whole_is_refused_and_nothing_is_set() {
    if !require_kvm() {
        return;
    }
    let memory = memory(2 * MIB);
    let (_vm, mut vcpu) = start(&memory, guest::spin(), EntryMode::LongUser);
    let good = waiting_for_a_deadline();
    let before = vcpu.save().expect("saved");
    let unknown = StatePiece { kind: "msrs2".to_owned(), ..good[0].clone() };
    let mut lists = vec![
        (vec![unknown.clone()], "unknown kind"),
        ([&good[..], &[unknown]].concat(), "unknown kind"),
        (Vec::new(), "cpuid: is missing"),
    ];
    for (at, piece) in good.iter().enumerate().filter(|(_, p)| p.kind != "tsc") {
        let mut without = good.clone();
        without.remove(at);
        lists.push((without, "is missing"));
        lists.push(([&good[..], std::slice::from_ref(piece)].concat(), "is there twice"));
        let mut newer = good.clone();
        newer[at].version += 1;
        lists.push((newer, "version 2 is not 1"));
    }
    // Both forms of the same piece.
    let other = good.iter().find(|p| p.kind.starts_with("sregs")).expect("sregs").clone();
    let kind = if other.kind == "sregs" { "sregs2" } else { "sregs" };
    lists.push(([&good[..], &[StatePiece { kind: kind.to_owned(), ..other }]].concat(), "is there twice"));
    for (list, problem) in lists {
        let error = vcpu.restore(&list).expect_err(problem);
        assert_eq!(error.reason(), "STATE_REJECTED");
        assert!(error.to_string().contains(problem), "{problem}: {error}");
    }
    let after = vcpu.save().expect("saved");
    for (after, before) in
        after.iter().zip(&before).filter(|(p, _)| !["tsc", "lapic"].contains(&p.kind.as_str()))
    {
        assert!(after == before, "{} has changed", after.kind);
    }
}
