//! `bpfvs man` and `bpfvs completions`: what a package installs beside the program, made from the same definitions as the command
//! line itself.
//!
//! ```text
//! bpfvs man target/man            bpfvs.8, bpfvs-serve.8, bpfvs-service-add.8, ..., ipvsadm.8, ipvsadm-save.8, ...
//! bpfvs completions bash          to be put into /usr/share/bash-completion/completions/bpfvs
//! ```

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use super::Arguments;
use crate::ipvsadm;

/// The section of the manual for what administrators type.
const SECTION: &str = "8";

#[derive(Args, Debug)]
pub(super) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Arguments::command(), "bpfvs", &mut text);
        io::stdout().write_all(&text).context("cannot print the completions; see where standard output goes")
    }
}

#[derive(Args, Debug)]
pub(super) struct Man {
    /// The directory; it is made if it is not there
    directory: PathBuf,
}

impl Man {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let failed = || format!("cannot write manual pages into {}; see that it can be written", self.directory.display());
        fs::create_dir_all(&self.directory).with_context(failed)?;
        let mut command = Arguments::command();
        command.build();
        pages(&command, &self.directory).with_context(failed)?;
        for (name, text) in ipvsadm_pages() {
            fs::write(self.directory.join(format!("{name}.{SECTION}")), text).with_context(failed)?;
        }
        Ok(())
    }
}

/// The page of a command, and those of its subcommands.
fn pages(command: &Command, directory: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let page =
        clap_mangen::Man::new(command.clone()).section(SECTION).title(&name).source(concat!("bpfvs ", env!("CARGO_PKG_VERSION")));
    let mut text = Vec::new();
    page.render(&mut text)?;
    fs::write(directory.join(format!("{name}.{SECTION}")), text)?;
    command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help").try_for_each(|part| pages(part, directory))
}

/// The pages of the other names that the program goes by.
fn ipvsadm_pages() -> [(&'static str, String); 3] {
    let page = |name: &str, what: &str, synopsis: &str, text: &str| {
        format!(
            ".TH {name} {SECTION} \"\" \"bpfvs {version}\"\n.SH NAME\n{escaped} \\- {what}\n.SH SYNOPSIS\n{synopsis}\n\
             .SH DESCRIPTION\n{text}\n.SH SEE ALSO\nbpfvs(8), ipvsadm(8), ipvsadm\\-save(8), ipvsadm\\-restore(8)\n",
            version = env!("CARGO_PKG_VERSION"),
            escaped = name.replace('-', "\\-"),
        )
    };
    let help = literally(&ipvsadm::help());
    let ipvsadm = format!(
        "This is ipvsadm of bpfvs: options, listings, messages and exit statuses are those of ipvsadm 1.31, but the table is\n\
         that of the bpfvs daemon of this network namespace, and not the kernel's.\n\
         The variable BPFVS_SOCKET names another daemon's socket.\n.PP\n\
         Exit status: 0 done, 1 what was to be listed is not there, 2 wrong usage or no daemon, 255 refused.\n\
         .SH OPTIONS\n.nf\n{help}.fi"
    );
    let save = "Prints all virtual services and real servers as lines for ipvsadm\\-restore.\n\
                With \\fB\\-n\\fR addresses and ports are numbers.\n\
                .PP\nThresholds are not saved, as with the original; \\fBbpfvs save\\fR does that.";
    let restore = "Clears the table, and reads lines of ipvsadm\\-save from standard input.\n\
                   A refused line does not keep those behind it from being read.\n\
                   .PP\n\\fBbpfvs restore\\fR is the strict one: all or nothing.";
    [
        (
            "ipvsadm",
            page("ipvsadm", "Linux Virtual Server administration", "\\fBipvsadm\\fR \\fIcommand\\fR [\\fIoptions\\fR]", &ipvsadm),
        ),
        ("ipvsadm-save", page("ipvsadm-save", "save the table to standard output", "\\fBipvsadm\\-save\\fR [\\fB\\-n\\fR]", save)),
        ("ipvsadm-restore", page("ipvsadm-restore", "restore the table from standard input", "\\fBipvsadm\\-restore\\fR", restore)),
    ]
}

/// Text as it is, for a formatter that would take some of it for its own.
fn literally(text: &str) -> String {
    let line = |line: &str| {
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        if line.starts_with(['.', '\'']) { format!("\\&{line}\n") } else { line + "\n" }
    };
    text.lines().map(line).collect()
}
