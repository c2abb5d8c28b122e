//! What integration tests with real processes share: waiting for things, and chance that can be repeated.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long a test waits for what must happen. For a test that would hang; not a verdict on speed.
#[derive(Debug, Clone, Copy)]
pub struct Patience(Duration);

impl Patience {
    /// So many seconds where nothing else runs. Tests run beside each other, and beside whatever else a machine does, so
    /// it is given several times that.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(4 * seconds))
    }

    /// The same, for what waits by itself.
    pub const fn duration(self) -> Duration {
        self.0
    }

    /// Waits until it is `done`, without sleeping.
    ///
    /// # Panics
    /// It takes too long; the message says `what` has still not happened.
    pub fn until(self, what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + self.0;
        while !done() {
            assert!(Instant::now() < end, "still not: {what}");
            std::thread::yield_now();
        }
    }
}

/// Pseudo-random numbers that a failure can be repeated with (xorshift, Marsaglia 2003).
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// From the seed in NVSHARE_TEST_SEED, or from this one. Prints it.
    pub fn from_environment(seed: u64) -> Self {
        let given = std::env::var("NVSHARE_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or(seed);
        println!("NVSHARE_TEST_SEED={seed}");
        Self(seed)
    }

    /// From this seed, which any number may be.
    pub fn new(seed: u64) -> Self {
        // Seeds that are alike must not begin alike, and zero would stay zero.
        Self(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number from 0 to `limit` - 1.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// Draws a card; a deck that is empty is `whole` again. So chance has the order, and not the count.
    pub fn draw<T: Copy>(&mut self, deck: &mut Vec<T>, whole: &[T]) -> T {
        if deck.is_empty() {
            deck.extend(whole);
        }
        deck.swap_remove(self.below(deck.len() as u64) as usize)
    }

    /// Burns up to so many microseconds: a moment that nothing in the protocol knows of.
    pub fn spin(&mut self, most: u64) {
        let moment = Instant::now() + Duration::from_nanos(self.below(1_000 * most));
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
    }
}

/// A program of `tests/programs/NAME.c`, built with the C compiler against the simulated GPU's driver; where it is. Built anew
/// when its source or the header is newer.
///
/// # Panics
/// It cannot be built; the message is the compiler's. The simulated GPU's driver must have been built before:
/// `cargo build --workspace`, with the profile of the test.
pub fn program(name: &str) -> PathBuf {
    built(name, name, &[])
}

/// A library of `tests/programs/NAME.c`, built as [`program`] is.
///
/// # Panics
/// As for [`program`].
pub fn library(name: &str) -> PathBuf {
    built(name, &format!("lib{name}.so"), &["-shared", "-fPIC"])
}

/// The stand-in for NCCL, `tests/programs/nccl_stand_in.c`, under NCCL's name.
///
/// # Panics
/// As for [`program`].
pub fn nccl() -> PathBuf {
    built("nccl_stand_in", "libnccl.so.2", &["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2"])
}

/// A program that uses the stand-in for NCCL: linked against it, or with a copy of it inside whose functions nobody else sees.
///
/// # Panics
/// As for [`program`].
pub fn program_with_nccl(name: &str, inside: bool) -> PathBuf {
    if inside {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../programs/nccl_stand_in.c");
        return built(
            name,
            &format!("{name}_with_nccl_inside"),
            &[source.to_str().expect("the path is UTF-8")],
        );
    }
    let library = nccl();
    let run_path = format!("-Wl,-rpath,{}", library.parent().expect("it is in a folder").display());
    built(name, name, &["-Wl,--no-as-needed", library.to_str().expect("the path is UTF-8"), &run_path])
}

fn built(name: &str, file: &str, options: &[&str]) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../programs");
    let source = sources.join(name).with_extension("c");
    let own = std::env::current_exe().expect("a running program has a path");
    // A program runs as target/PROFILE/NAME, a test as target/PROFILE/deps/NAME.
    let folder = own.parent().expect("a program is in a folder");
    let profile = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let folder = profile.join("test-programs");
    let program = folder.join(file);
    let modified = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    let shared = ["driver.h", "nccl.h", "nccl_stand_in.c"].map(|name| modified(&sources.join(name)));
    let newest_source = shared.into_iter().chain([modified(&source)]).max().flatten();
    if modified(&program) > newest_source {
        return program;
    }
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    // Several tests may build the same program at once: each makes its own file, and the last one stays.
    let made = folder.join(format!("{file}.{}-{:?}", std::process::id(), std::thread::current().id()));
    let built = Command::new("cc")
        .args(["-O1", "-g", "-Wall", "-Werror", "-pthread"])
        .args(options)
        .arg("-o")
        .arg(&made)
        .arg(&source)
        .arg(profile.join("libsimcuda.so"))
        .arg("-ldl")
        .output()
        .expect("the C compiler, cc, can be started");
    assert!(built.status.success(), "{}: {}", source.display(), String::from_utf8_lossy(&built.stderr));
    std::fs::rename(&made, &program).expect("the target folder can be written");
    program
}
