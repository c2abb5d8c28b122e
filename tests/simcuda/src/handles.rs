//! Handles: the numbers that stand for objects across the C ABI.
//!
//! A handle is never followed, only looked up, so a stale or invented one is an error and not a crash. Objects that
//! every launch needs are looked up through a [`Cache`] of the thread, which costs two loads: a registry's generation
//! changes with every removal, and a cached object of an older generation is looked up anew.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::LocalKey;

use crate::abi::{Error, Handle, Result};

/// Makes a handle that no other object ever had. It looks like an address of the driver's heap, but nothing is there.
pub fn fresh() -> Handle {
    static NEXT: AtomicUsize = AtomicUsize::new(0x51_0000_0010);
    NEXT.fetch_add(64, Ordering::Relaxed)
}

/// All objects of a kind.
pub struct Registry<T> {
    objects: RwLock<HashMap<Handle, Arc<T>>>,
    generation: AtomicU64,
}

impl<T> Registry<T> {
    pub fn new() -> Registry<T> {
        Registry { objects: RwLock::default(), generation: AtomicU64::new(1) }
    }

    pub fn insert(&self, handle: Handle, object: Arc<T>) {
        self.objects.write().unwrap_or_else(|e| e.into_inner()).insert(handle, object);
    }

    pub fn get(&self, handle: Handle) -> Result<Arc<T>> {
        let objects = self.objects.read().unwrap_or_else(|e| e.into_inner());
        objects.get(&handle).cloned().ok_or(Error::INVALID_HANDLE)
    }

    /// The handle of the object that `which` chooses.
    pub fn find(&self, which: impl Fn(&T) -> bool) -> Option<Handle> {
        let objects = self.objects.read().unwrap_or_else(|e| e.into_inner());
        objects.iter().find(|(_, object)| which(object)).map(|(handle, _)| *handle)
    }

    pub fn all(&self) -> Vec<Arc<T>> {
        self.objects.read().unwrap_or_else(|e| e.into_inner()).values().cloned().collect()
    }

    pub fn remove(&self, handle: Handle) -> Result<Arc<T>> {
        let removed = self.objects.write().unwrap_or_else(|e| e.into_inner()).remove(&handle);
        self.generation.fetch_add(1, Ordering::Release);
        removed.ok_or(Error::INVALID_HANDLE)
    }

    /// Removes and returns what `which` chooses.
    pub fn remove_if(&self, which: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let mut objects = self.objects.write().unwrap_or_else(|e| e.into_inner());
        let removed = objects.extract_if(|_, object| which(object)).map(|(_, object)| object).collect();
        self.generation.fetch_add(1, Ordering::Release);
        removed
    }

    /// Calls `f` with the object, from the thread's cache if it is there.
    #[inline]
    pub fn with<R>(
        &self,
        cache: &'static LocalKey<Cache<T>>,
        handle: Handle,
        f: impl FnOnce(&Arc<T>) -> R,
    ) -> Result<R> {
        let generation = self.generation.load(Ordering::Acquire);
        let mut f = Some(f);
        let cached = cache.try_with(|cache| {
            let mut entry = cache.0.try_borrow_mut().ok()?;
            if !matches!(&*entry, Some((h, g, _)) if *h == handle && *g == generation) {
                match self.get(handle) {
                    Ok(object) => *entry = Some((handle, generation, object)),
                    Err(error) => return Some(Err(error)),
                }
            }
            let (_, _, object) = entry.as_ref()?;
            Some(Ok(f.take()?(object)))
        });
        match (cached, f) {
            (Ok(Some(result)), _) => result,
            // The cache is in use further up, or gone since the thread is ending.
            (_, Some(f)) => Ok(f(&self.get(handle)?)),
            (_, None) => Err(Error::INVALID_HANDLE),
        }
    }
}

/// The object that a thread used last, with its handle and the registry's generation at the time.
pub struct Cache<T>(RefCell<Option<(Handle, u64, Arc<T>)>>);

impl<T> Cache<T> {
    pub const fn new() -> Cache<T> {
        Cache(RefCell::new(None))
    }
}
