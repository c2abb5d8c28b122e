//! Makes the manual pages and completions of `nvshare`, `nvsharectl`, `nvshare-arbiter` and `nvshare-kubernetes` from their command lines:
//! `nvshare-documents FOLDER` writes `FOLDER/man/*` and `FOLDER/completions/{bash,zsh,fish}/*`.

use clap::{Command, CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use nvshare_arbiter::configuration;
use nvshare_tools::cli::Cli;
use nvshare_tools::nvsharectl;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("nvshare-documents FOLDER: where shall the manual pages and completions be?");
        return ExitCode::from(2);
    };
    match write(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nvshare-documents: {}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}

/// A program and the section of its manual page: 1 for users' commands, 8 for administrators'.
fn programs() -> [(Command, &'static str); 4] {
    [
        (without_hidden(&Cli::command()), "1"),
        (nvsharectl::Cli::command(), "1"),
        (configuration::command(), "8"),
        (nvshare_kubernetes::options::Cli::command(), "8"),
    ]
}

/// A command without its hidden subcommands, which completions would offer. clap cannot take a subcommand away, so this is a
/// new command of the same parts.
fn without_hidden(command: &Command) -> Command {
    let text = |text: &str| -> &'static str { text.to_owned().leak() };
    Command::new(text(command.get_name()))
        .version(text(command.get_version().unwrap_or_default()))
        .about(command.get_about().cloned().unwrap_or_default())
        .after_help(command.get_after_help().cloned().unwrap_or_default())
        .args(command.get_arguments().cloned())
        .subcommands(command.get_subcommands().filter(|part| !part.is_hide_set()).cloned())
}

fn write(folder: &Path) -> io::Result<()> {
    let man = folder.join("man");
    fs::create_dir_all(&man)?;
    for (command, section) in programs() {
        let name = command.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let shells =
                folder.join("completions").join(shell.to_possible_value().expect("a shell").get_name());
            fs::create_dir_all(&shells)?;
            clap_complete::generate_to(shell, &mut command.clone(), &name, &shells)?;
        }
        pages(command, section, &man)?;
    }
    Ok(())
}

/// Writes the page of a command, and of each of its subcommands as `COMMAND-SUBCOMMAND`.
fn pages(command: Command, section: &str, folder: &Path) -> io::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    page(&command, section, folder)
}

fn page(command: &Command, section: &str, folder: &Path) -> io::Result<()> {
    for part in command.get_subcommands().filter(|part| !part.is_hide_set()) {
        page(part, section, folder)?;
    }
    Man::new(command.clone()).section(section).manual("nvshare").generate_to(folder)?;
    Ok(())
}
