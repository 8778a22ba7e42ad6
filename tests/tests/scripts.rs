//! The shell scripts that people start their LVS with: `lvs-DR.sh` on the director and `rs-DR.sh` on each real server, in the form
//! that goes from how-to to how-to (`ifconfig eth0:1`, `echo 1 >/proc/sys/...`, `ipvsadm`), run as they stand. All that is ours is
//! the `ipvsadm` on their path.

use std::{env, path::Path};

use anyhow::{Result, ensure};
use bpfvs_tests::{
    bpfvs::Bpfvs,
    lab::{Lab, Layout},
    needs, needs_bpfvs,
    netns::{Namespace, run},
    programs::{Nginx, curl_port},
};

/// The port of the scripts' service.
const PORT: u16 = 10087;

#[test]
fn lvs_dr_and_rs_dr_start_and_stop() -> Result<()> {
    needs!(root, "curl", "ifconfig", "nginx", "route");
    needs_bpfvs!();
    let lab = Lab::new(Layout::OneSegment, 2)?;
    // The scripts bring the virtual address; who is not asked for it on `lo` would not be found.
    lab.director.ip("addr del 10.0.0.200/32 dev lo")?;
    lab.director.sysctl(&[("net.ipv4.conf.all.send_redirects", "0"), ("net.ipv4.conf.eth0.send_redirects", "0")])?;
    let servers = lab.servers.iter().zip(["rs1", "rs2"]);
    let _nginx = servers.map(|(server, name)| Nginx::start(server, name)).collect::<Result<Vec<_>>>()?;
    let bpfvs = Bpfvs::start(&lab.director, &[])?;
    let script = |namespace: &Namespace, name: &str, action: &str| -> Result<String> {
        let path = format!("{}:{}", bpfvs.programs().display(), env::var("PATH").unwrap_or_default());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/scripts").join(name);
        let mut command = namespace.command("bash");
        run(command.arg(script).arg(action).env("PATH", path).env("BPFVS_SOCKET", bpfvs.socket()))
    };
    let vip = lab.vip.ipv4.into();

    for round in 1..=2 {
        for server in &lab.servers {
            script(server, "rs-DR.sh", "start")?;
        }
        let said = script(&lab.director, "lvs-DR.sh", "start")?;
        ensure!(said.contains("10.0.0.200:10087 wrr persistent 60") && said.contains("Route   2"), "round {round}: {said}");
        bpfvs.wait_for_servers()?;
        let answers = (0..4).map(|_| curl_port(&lab.client, vip, PORT)).collect::<Result<Vec<_>>>()?;
        ensure!(answers.iter().all(|answer| *answer == answers[0]), "round {round}: a persistent client got {answers:?}");

        script(&lab.director, "lvs-DR.sh", "stop")?;
        ensure!(!bpfvs.ipvsadm("-Ln")?.contains("TCP"), "round {round}: rules are left");
        let url = format!("http://{vip}:{PORT}/");
        lab.client.run("curl", ["--silent", "--max-time", "1", &url]).expect_err("nobody serves the address any more");
        for server in &lab.servers {
            script(server, "rs-DR.sh", "stop")?;
            let addresses = server.run("ip", ["-4", "addr", "show", "lo"])?;
            ensure!(!addresses.contains("10.0.0.200"), "round {round}: the real server still has the address: {addresses}");
        }
    }
    Ok(())
}
