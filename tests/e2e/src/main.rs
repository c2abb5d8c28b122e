//! `nvshare-test-calls`: makes the CUDA calls that a test names. See `calls`.

mod calls;

use nvshare_tools::Failure;
use std::process::ExitCode;

fn main() -> ExitCode {
    match calls::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { status, message }) => {
            eprintln!("nvshare-test-calls: {message}");
            ExitCode::from(status)
        }
    }
}
