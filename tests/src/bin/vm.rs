//! Runs a script as root in a virtual machine with another kernel; nothing of it touches this host.
//!
//! ```text
//! cargo run -p bpfvs-tests --bin vm -- [OPTION]... SCRIPT [ARGUMENT]...
//! cargo run -p bpfvs-tests --bin vm -- -c 'uname -r; modprobe ip_vs; ipvsadm -Ln'
//! ```

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use bpfvs_tests::vm::{Kernel, Machine, Version, machine::ipvs};
use clap::Parser;

/// Run a script as root in a virtual machine with another kernel.
///
/// The guest has busybox, bash, iproute2 and what else of ipvsadm, curl, tcpdump, … this host has, and no network. The
/// script's output and status are this program's.
#[derive(Debug, Parser)]
struct Options {
    /// The kernel: 6.1 or 6.12, from Debian's packages, fetched at first use.
    #[arg(long, default_value = "6.12")]
    kernel: Version,
    /// Copy a program with its libraries, a file or a directory into the guest, at the same path or at DESTINATION.
    #[arg(long, value_name = "PATH[:DESTINATION]")]
    add: Vec<String>,
    /// Make a symbolic link in the guest.
    #[arg(long, value_name = "PATH=TARGET")]
    link: Vec<String>,
    /// Load further kernel modules.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    modules: Vec<String>,
    /// Do not load the kernel's own IPVS.
    #[arg(long)]
    no_ipvs: bool,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// Virtual processors; with more than one, emulation is not quite reliable.
    #[arg(long, default_value_t = 1)]
    processors: u32,
    /// Let time count instructions: measurements repeat to within a part in a thousand.
    #[arg(long)]
    icount: bool,
    /// Give up after so many seconds.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// Only fetch the kernel.
    #[arg(long)]
    prepare: bool,
    /// Commands to run, instead of a script.
    #[arg(short, value_name = "COMMANDS", conflicts_with = "script")]
    commands: Option<String>,
    /// The script.
    #[arg(required_unless_present_any = ["commands", "prepare"])]
    script: Option<PathBuf>,
    /// Its arguments.
    #[arg(trailing_var_arg = true)]
    arguments: Vec<String>,
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("vm: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(options: Options) -> Result<i32> {
    if options.prepare {
        println!("{}", Kernel::get(options.kernel)?.release);
        return Ok(0);
    }
    let script = match (options.commands, options.script) {
        (Some(commands), _) => commands,
        (None, Some(path)) => fs::read_to_string(&path).with_context(|| format!("read the script {}", path.display()))?,
        (None, None) => String::new(),
    };
    let extra: Vec<&str> = options.modules.iter().map(String::as_str).collect();
    let mut machine = Machine::new(options.kernel)?
        .modules(&extra)
        .memory(options.memory)
        .processors(options.processors)
        .deadline(Duration::from_secs(options.timeout));
    if !options.no_ipvs {
        machine = machine.modules(ipvs(options.kernel));
    }
    if options.icount {
        machine = machine.deterministic();
    }
    for addition in &options.add {
        let (from, to) = addition.split_once(':').unwrap_or((addition, addition));
        machine = machine.add(&PathBuf::from(from), to)?;
    }
    for link in &options.link {
        let (path, target) = link.split_once('=').with_context(|| format!("--link {link}: write PATH=TARGET"))?;
        machine = machine.link(path, target);
    }
    machine.run_into(&script, &options.arguments, &mut std::io::stdout().lock())
}
