//! One program under several names: what it is called decides which command line it has.

use std::{env, ffi::OsString, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    let program = arguments.first().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default();
    match Path::new(&program).file_name().and_then(|name| name.to_str()) {
        Some("ipvsadm" | "ipvsadm-save" | "ipvsadm-restore") => bpfvs::cli::ipvsadm::run(&program, &arguments[1..], None),
        _ => bpfvs::cli::run(arguments),
    }
}
