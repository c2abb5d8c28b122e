//! What comes over the arbiter's socket: any bytes are a message or are refused with a sentence, and what
//! is a message is the same bytes again.

use nvshare::control::{PAUSE_MAGIC, PauseRequest, SETTINGS_MAGIC, SettingsRequest};
use nvshare::page::LAYOUT_VERSION;
use nvshare::slot::{Owner, SlotIndex};
use nvshare::units::GpuUuid;
use nvshare::usage::MAX_WEIGHT;
use nvshare::wire::{
    ATTACH_MAGIC, Attach, CHANGE_MAGIC, Change, GangRequest, Hello, LOOK_MAGIC, Message, Reply, RequestKind,
    SharesUpdate, Status, WIRE_MAGIC,
};

/// Reads the bytes as either side does. The first one says whether they are read as they are, or with the
/// identity put right: a fuzzer should not have to guess twelve bytes before it comes to the rest.
pub fn run(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if first & 1 == 1 && bytes.len() >= 12 {
        let magic = [WIRE_MAGIC, LOOK_MAGIC, CHANGE_MAGIC, ATTACH_MAGIC][usize::from(first >> 3 & 3)];
        bytes[..8].copy_from_slice(&magic.to_le_bytes());
        bytes[8..12].copy_from_slice(&LAYOUT_VERSION.to_le_bytes());
    }
    if first & 2 == 2 {
        bytes.resize(size_of::<Hello>(), *first);
    }
    if first & 4 == 4 {
        bytes.resize(size_of::<Reply>(), *first);
    }
    if first & 32 == 32 {
        bytes.resize(size_of::<Change>(), 0);
    }
    if first & 128 == 128 && bytes.len() >= 12 {
        let (magic, length) = match first & 1 {
            0 => (PAUSE_MAGIC, size_of::<PauseRequest>()),
            _ => (SETTINGS_MAGIC, size_of::<SettingsRequest>()),
        };
        bytes[..8].copy_from_slice(&magic.to_le_bytes());
        bytes[8..12].copy_from_slice(&LAYOUT_VERSION.to_le_bytes());
        bytes.resize(length, 0);
    }
    if first & 64 == 64 {
        bytes.resize(size_of::<Attach>(), 0);
    }
    message(&bytes);
    reply(&bytes);
}

/// As the arbiter reads it.
fn message(bytes: &[u8]) {
    match Message::read(bytes) {
        Ok(Message::Change(change, slot, edit)) => {
            assert_eq!(bytemuck::bytes_of(&change), bytes);
            assert_ne!(edit, SharesUpdate::default(), "it changes nothing");
            assert!(edit.weight.is_none_or(|weight| (1..=MAX_WEIGHT).contains(&weight)));
            // Whoever asks for the same again says the same.
            assert_eq!(Change::new(GpuUuid(change.gpu), slot, change.owner(), edit), change);
        }
        Ok(Message::Attach(attach, slot)) => {
            assert_eq!(bytemuck::bytes_of(&attach), bytes);
            assert_eq!(Attach::new(GpuUuid(attach.gpu), slot, attach.owner()), attach);
        }
        Ok(Message::Gang(request, slot)) => {
            assert_eq!(bytemuck::bytes_of(&request), bytes);
            let (owner, what) = (Owner { generation: request.generation, pid: request.pid }, request.key);
            let again =
                GangRequest::new(GpuUuid(request.gpu), slot, owner, what, request.size, request.joins());
            assert_eq!(again, request);
        }
        Ok(Message::Pause(request, slot, suspension)) => {
            assert_eq!(bytemuck::bytes_of(&request), bytes);
            let owner = Owner { generation: request.generation, pid: request.pid };
            assert_eq!(PauseRequest::new(GpuUuid(request.gpu), slot, owner, suspension), request);
        }
        Ok(Message::Settings(gpu, change)) => {
            // What is readable of it is the same again; bytes that are no text are not.
            if let Ok(again) = SettingsRequest::new(gpu, &change) {
                assert_eq!(SettingsRequest::read(bytemuck::bytes_of(&again)), Ok((gpu, change)));
            }
        }
        Ok(Message::Hello(_)) => hello(bytes),
        Err(refusal) => {
            hello(bytes);
            refused(&refusal);
        }
    }
}

fn refused(refusal: &Reply) {
    assert!(!refusal.text().is_empty(), "a refusal that does not say why");
    let (read, status) = Reply::read(bytemuck::bytes_of(refusal)).expect("our own reply");
    assert_eq!(read, *refusal);
    assert!(matches!(status, Status::Malformed | Status::LayoutVersion));
}

fn hello(bytes: &[u8]) {
    match Hello::read(bytes) {
        Ok(hello) => {
            assert_eq!(bytemuck::bytes_of(&hello), bytes);
            let name = hello.name();
            presentable(&name);
            // What a person reads is itself a name, and the same one.
            let again = Hello::new(GpuUuid(hello.gpu), &name);
            assert!(name.starts_with(&again.name()));
            // Nobody gets a slot who has not asked for one.
            let asks = match hello.request_kind() {
                RequestKind::Slot => WIRE_MAGIC,
                RequestKind::Look => LOOK_MAGIC,
            };
            assert_eq!(hello.magic, asks);
            // Whatever it asks for is within bounds, and can be asked for again.
            let shares = hello.shares();
            assert_eq!(hello.with(shares).shares(), shares);
            assert!((1..=MAX_WEIGHT).contains(&shares.weight));
        }
        Err(refusal) => refused(&refusal),
    }
}

fn reply(bytes: &[u8]) {
    match Reply::read(bytes) {
        Ok((reply, status)) => {
            assert_eq!(bytemuck::bytes_of(&reply), bytes);
            assert_eq!(reply.status, status as u32);
            presentable(&reply.text());
            let _ = SlotIndex::new(reply.slot as usize);
        }
        Err(why) => assert!(!why.is_empty()),
    }
}

fn presentable(text: &str) {
    assert!(!text.chars().any(char::is_control), "a text that talks to terminals");
}
