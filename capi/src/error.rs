//! Codes for programs, and the sentence for the person behind each.

use nvshare::SessionError;
use nvshare::register::RegisterError;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How a call ended.
#[repr(i32)]
#[allow(non_camel_case_types)] // C has no other place for the prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Done.
    NVSHARE_OK = 0,
    /// An argument makes no sense.
    NVSHARE_ERROR_INVALID_ARGUMENT = 1,
    /// No arbiter answers.
    NVSHARE_ERROR_NO_ARBITER = 2,
    /// The arbiter refused: it does not serve the GPU, all slots are taken, or its release does not fit.
    NVSHARE_ERROR_REFUSED = 3,
    /// What answers is no arbiter that this process believes, or not of this release.
    NVSHARE_ERROR_STRANGER = 4,
    /// One of the runtime's functions failed; the client has ended.
    NVSHARE_ERROR_RUNTIME = 5,
    /// The client was closed.
    NVSHARE_ERROR_CLOSED = 6,
    /// This process was forked from the one that has the client.
    NVSHARE_ERROR_FORKED = 7,
    /// The GPU did not come in time.
    NVSHARE_ERROR_TIMED_OUT = 8,
    /// The client could never have so much memory.
    NVSHARE_ERROR_TOO_LARGE = 9,
    /// The system refused something, such as a thread.
    NVSHARE_ERROR_SYSTEM = 10,
    /// A fault of the library's.
    NVSHARE_ERROR_PANIC = 11,
}

impl Code {
    const ALL: [(Self, &'static CStr); 12] = [
        (Self::NVSHARE_OK, c"NVSHARE_OK"),
        (Self::NVSHARE_ERROR_INVALID_ARGUMENT, c"NVSHARE_ERROR_INVALID_ARGUMENT"),
        (Self::NVSHARE_ERROR_NO_ARBITER, c"NVSHARE_ERROR_NO_ARBITER"),
        (Self::NVSHARE_ERROR_REFUSED, c"NVSHARE_ERROR_REFUSED"),
        (Self::NVSHARE_ERROR_STRANGER, c"NVSHARE_ERROR_STRANGER"),
        (Self::NVSHARE_ERROR_RUNTIME, c"NVSHARE_ERROR_RUNTIME"),
        (Self::NVSHARE_ERROR_CLOSED, c"NVSHARE_ERROR_CLOSED"),
        (Self::NVSHARE_ERROR_FORKED, c"NVSHARE_ERROR_FORKED"),
        (Self::NVSHARE_ERROR_TIMED_OUT, c"NVSHARE_ERROR_TIMED_OUT"),
        (Self::NVSHARE_ERROR_TOO_LARGE, c"NVSHARE_ERROR_TOO_LARGE"),
        (Self::NVSHARE_ERROR_SYSTEM, c"NVSHARE_ERROR_SYSTEM"),
        (Self::NVSHARE_ERROR_PANIC, c"NVSHARE_ERROR_PANIC"),
    ];
}

/// Why a call failed.
pub struct Failure {
    code: Code,
    message: String,
}

impl Failure {
    pub fn invalid(message: String) -> Self {
        Self { code: Code::NVSHARE_ERROR_INVALID_ARGUMENT, message }
    }

    pub fn null(what: &str) -> Self {
        Self::invalid(format!("{what} is NULL"))
    }

    pub fn system(message: String) -> Self {
        Self { code: Code::NVSHARE_ERROR_SYSTEM, message }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        let code = match error {
            SessionError::Runtime(_) => Code::NVSHARE_ERROR_RUNTIME,
            SessionError::Panicked(_) => Code::NVSHARE_ERROR_PANIC,
            SessionError::Closed => Code::NVSHARE_ERROR_CLOSED,
            SessionError::Forked { .. } => Code::NVSHARE_ERROR_FORKED,
            SessionError::TimedOut(_) => Code::NVSHARE_ERROR_TIMED_OUT,
            SessionError::TooLarge { .. } => Code::NVSHARE_ERROR_TOO_LARGE,
        };
        Self { code, message: error.to_string() }
    }
}

impl From<RegisterError> for Failure {
    fn from(error: RegisterError) -> Self {
        let code = match error {
            RegisterError::NoArbiter { .. } => Code::NVSHARE_ERROR_NO_ARBITER,
            RegisterError::Refused { .. } => Code::NVSHARE_ERROR_REFUSED,
            RegisterError::Nonsense { .. } | RegisterError::Stranger { .. } | RegisterError::Page { .. } => {
                Code::NVSHARE_ERROR_STRANGER
            }
        };
        Self { code, message: error.to_string() }
    }
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// Runs a function's body: its failure becomes a code and this thread's message, and so does a panic.
pub fn guard(body: impl FnOnce() -> Result<(), Failure>) -> Code {
    // After a panic the caller's handle is as the library left it; the caller is told.
    let ended = catch_unwind(AssertUnwindSafe(body));
    let failure = match ended {
        Ok(Ok(())) => return Code::NVSHARE_OK,
        Ok(Err(failure)) => failure,
        Err(_) => Failure {
            code: Code::NVSHARE_ERROR_PANIC,
            message: "a fault of nvshare's own: see standard error, and report it".into(),
        },
    };
    let text: Vec<u8> = failure.message.into_bytes().into_iter().filter(|byte| *byte != 0).collect();
    // While the thread ends, it has no message any more.
    let _ = MESSAGE.try_with(|message| *message.borrow_mut() = CString::new(text).unwrap_or_default());
    failure.code
}

/// What this thread's last failed call said: a sentence for a person, in UTF-8. Empty if none has failed. It stays until the thread's
/// next failed call, or its end.
#[unsafe(no_mangle)]
pub extern "C" fn nvshare_message() -> *const c_char {
    MESSAGE.try_with(|message| message.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// The name of a code, such as "NVSHARE_OK"; of every number that is none, "NVSHARE_UNKNOWN". It stays for ever.
#[unsafe(no_mangle)]
pub extern "C" fn nvshare_code_name(code: i32) -> *const c_char {
    let known = Code::ALL.iter().find(|(known, _)| *known as i32 == code);
    known.map_or(c"NVSHARE_UNKNOWN", |(_, name)| name).as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        // SAFETY: it is this thread's, and nothing fails meanwhile.
        unsafe { CStr::from_ptr(nvshare_message()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_code_and_each_thread_has_its_own_message() {
        assert_eq!(
            (guard(|| panic!("a test")), message()),
            (
                Code::NVSHARE_ERROR_PANIC,
                "a fault of nvshare's own: see standard error, and report it".to_owned()
            )
        );
        assert_eq!(
            guard(|| Err(Failure::invalid("with a \0 in it".into()))),
            Code::NVSHARE_ERROR_INVALID_ARGUMENT
        );
        assert_eq!((guard(|| Ok(())), message()), (Code::NVSHARE_OK, "with a  in it".to_owned()));
        std::thread::spawn(|| assert_eq!(message(), "")).join().unwrap();
    }

    #[test]
    fn every_code_has_its_name() {
        for (at, (code, _)) in Code::ALL.iter().enumerate() {
            assert_eq!(*code as usize, at);
        }
        // SAFETY: names are constants.
        let name = |code| unsafe { CStr::from_ptr(nvshare_code_name(code)) }.to_str().unwrap();
        assert_eq!(
            [0, 8, 12, -1].map(name),
            ["NVSHARE_OK", "NVSHARE_ERROR_TIMED_OUT", "NVSHARE_UNKNOWN", "NVSHARE_UNKNOWN"]
        );
    }
}
