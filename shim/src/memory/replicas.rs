//! The client as a member of a group of replicas ([`crate::replicas`]): it joins when its engine begins, and a thread says what it
//! lacks. What its engine gives and takes is in [`crate::memory::swap`].

use crate::cuda::abi::CUdeviceptr;
use crate::memory::device::Device;
use crate::replicas::taking::{self, Taker};
use crate::replicas::{Digest, Group};
use crate::settings::{KeepCopies, settings};
use nvshare::units::Granules;
use std::sync::{Arc, Weak};

impl Device {
    /// Joins the group that NVSHARE_REPLICAS names, if it names one.
    pub fn join_replicas(self: &Arc<Self>) {
        let Ok(settings) = settings() else { return };
        let Some(name) = &settings.replicas else { return };
        let gpu = self.gpu;
        if settings.keep_copies == KeepCopies::Off {
            tracing::warn!(
                %gpu,
                "NVSHARE_REPLICAS={name} has no effect, because NVSHARE_KEEP_COPIES=off: only what has a copy in host memory is handed over"
            );
            return;
        }
        if !self.exportable {
            tracing::warn!(
                %gpu,
                "NVSHARE_REPLICAS={name} has no effect: this GPU's memory cannot be passed to other processes as file descriptors"
            );
            return;
        }
        let group = Arc::new(Group::new(gpu, name));
        let started =
            taking::start(&group, self.books.page(), self.books.slot(), Lacking(Arc::downgrade(self)));
        match started {
            Ok(()) => {
                tracing::debug!(%gpu, "a member of the replicas '{name}'");
                let _ = self.replicas.set(group);
            }
            Err(error) => tracing::warn!(
                %gpu,
                "NVSHARE_REPLICAS={name} has no effect, because the socket or the thread for it could not be made: {error}. Everything is copied from host memory"
            ),
        }
    }

    /// Leaves the group.
    pub fn leave_replicas(&self) {
        if let Some(group) = self.replicas.get() {
            group.leave();
        }
    }
}

/// What a GPU's client lacks.
struct Lacking(Weak<Device>);

impl Taker for Lacking {
    fn promise(&self, offered: &[Digest], most: Granules) -> Vec<(u32, CUdeviceptr)> {
        let Some(device) = self.0.upgrade() else { return Vec::new() };
        // Who is not admitted brings nothing in now; what came would lie about.
        if !device.books.admitted() {
            return Vec::new();
        }
        let offered = &offered[..offered.len().min(device.imported.room())];
        device.memory().promise(offered, most)
    }

    fn take_back(&self, promised: &[CUdeviceptr]) {
        if let Some(device) = self.0.upgrade() {
            device.memory().unpromise(promised);
        }
    }
}
