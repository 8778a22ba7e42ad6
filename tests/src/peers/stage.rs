//! The network, with a peer in its place.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    thread,
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::peer::{Method, Peer};
use crate::{
    balanced::Balanced,
    lab::{Family, Lab, Layout},
    netns::{Namespace, Process},
    pass::PassProgram,
    programs::{IperfServer, Nginx, curl, host},
    test_run::Hook,
    wait,
};

/// The real servers.
const SERVERS: u8 = 2;
/// The port of the real servers' nginx, and that of iperf3, which always goes to the first real server: its two connections
/// belong together.
const PORTS: [u16; 2] = [80, 5201];
/// Local addresses for FULLNAT: a run of short connections takes more ports than one has.
const LOCAL: [Ipv4Addr; 4] =
    [Ipv4Addr::new(10, 0, 0, 230), Ipv4Addr::new(10, 0, 0, 231), Ipv4Addr::new(10, 0, 0, 232), Ipv4Addr::new(10, 0, 0, 233)];
/// Where Debian has nginx's module.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// Client, real servers, and a peer between them.
#[derive(Debug)]
pub struct Stage {
    /// Whom the client asks.
    pub target: IpAddr,
    /// Ends before the network does.
    between: Between,
    _servers: (Vec<Nginx>, IperfServer),
    _pass: Option<PassProgram>,
}

/// What runs on the director, and the network.
#[derive(Debug)]
enum Between {
    Bpfvs(Balanced),
    Program { _process: Option<Process>, _files: TempDir, lab: Lab },
}

impl Stage {
    /// Makes the network and starts everything. It is proved that requests are answered.
    pub fn new(peer: Peer) -> Result<Self> {
        let lab = Lab::new(Layout::Masquerade, SERVERS)?;
        let is_xdp = matches!(peer, Peer::Bpfvs(_, Hook::Xdp));
        let pass = if is_xdp { Some(lab.prepare_for_xdp()?) } else { None };
        for host in lab.servers.iter().chain([&lab.client, &lab.director]) {
            host.sysctl(&[("net.ipv4.ip_local_port_range", "1024 65535"), ("net.ipv4.tcp_tw_reuse", "1")])?;
        }
        let iperf = IperfServer::start(&lab.servers[0])?;
        let vip = lab.vip.of(Family::Ipv4);
        let (target, nginx, between) = if let Peer::Bpfvs(method, hook) = peer {
            (vip, Vec::new(), Between::Bpfvs(bpfvs(lab, method, hook)?))
        } else {
            let nginx = lab.servers.iter().zip(1..).map(|(server, number)| Nginx::start(server, &format!("rs{number}")));
            let nginx = nginx.collect::<Result<_>>()?;
            let files = TempDir::new()?;
            let (target, process) = program(&lab, peer, &files)?;
            (target, nginx, Between::Program { _process: process, _files: files, lab })
        };
        let stage = Self { target, between, _servers: (nginx, iperf), _pass: pass };
        let mut refusal = None;
        wait::until(&format!("{peer} to balance"), wait::SOON, || match curl(stage.client(), target) {
            Ok(_) => true,
            Err(error) => {
                refusal = Some(error);
                false
            }
        })
        .with_context(|| format!("{refusal:?}"))?;
        Ok(stage)
    }

    /// The client's namespace.
    pub fn client(&self) -> &Namespace {
        match &self.between {
            Between::Bpfvs(balanced) => &balanced.lab.client,
            Between::Program { lab, .. } => &lab.client,
        }
    }
}

fn bpfvs(lab: Lab, method: Method, hook: Hook) -> Result<Balanced> {
    // Answers of real servers that have the virtual address come from an address that the director has itself.
    lab.director.sysctl(&[("net.ipv4.conf.all.accept_local", "1"), ("net.ipv4.conf.eth0.accept_local", "1")])?;
    let balanced = Balanced::in_lab(lab, &["--hook", if hook == Hook::Xdp { "xdp" } else { "tc" }])?;
    let lab = &balanced.lab;
    match method {
        Method::Route => lab.add_vip_to_servers()?,
        Method::Tunnel => balanced.set_up_tunnels(&[])?,
        Method::Masquerade => {}
        Method::FullNat => {
            for address in LOCAL {
                lab.director.ip(&format!("addr add {address}/32 dev eth0"))?;
                balanced.bpfvs.succeed(&["localaddr", "add", &address.to_string()])?;
            }
        }
    }
    let vip = host(lab.vip.of(Family::Ipv4));
    for port in PORTS {
        balanced.bpfvs.ipvsadm(&format!("-A -t {vip}:{port} -s rr"))?;
        for address in servers(lab, port) {
            balanced.bpfvs.ipvsadm(&format!("-a -t {vip}:{port} -r {address}:{port} {}", method.options()))?;
        }
    }
    balanced.bpfvs.wait_for_servers()?;
    Ok(balanced)
}

/// The addresses of a port's real servers.
fn servers(lab: &Lab, port: u16) -> Vec<Ipv4Addr> {
    let count = if port == PORTS[0] { lab.server_addresses.len() } else { 1 };
    lab.server_addresses.iter().take(count).map(|twins| twins.ipv4).collect()
}

/// Sets up a peer that is no bpfvs. Returns whom to ask, and the process that balances, if it is one.
fn program(lab: &Lab, peer: Peer, files: &TempDir) -> Result<(IpAddr, Option<Process>)> {
    let vip = lab.vip.of(Family::Ipv4);
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let directory = files.path().display();
    let per_port = |port_and_servers: &dyn Fn(u16, Vec<Ipv4Addr>) -> String| -> String {
        PORTS.into_iter().map(|port| port_and_servers(port, servers(lab, port))).collect()
    };
    let start = |program: &str, configuration: String, options: &[&str]| -> Result<Option<Process>> {
        let file = files.path().join("configuration");
        fs::write(&file, configuration)?;
        let mut command: Command = lab.director.command(program);
        command.args(options).arg(&file);
        Ok(Some(Process::spawn(&mut command)?))
    };
    Ok(match peer {
        Peer::Routing => {
            let gateway = vip;
            lab.client.ip(&format!("route add 10.0.0.0/24 via {gateway}"))?;
            (lab.server_addresses[0].ipv4.into(), None)
        }
        Peer::Nftables => {
            let rules = per_port(&|port, servers| {
                let turns: Vec<_> = servers.iter().enumerate().map(|(turn, server)| format!("{turn} : {server}")).collect();
                format!("ip daddr {vip} tcp dport {port} dnat to numgen inc mod {} map {{ {} }}\n", servers.len(), turns.join(", "))
            });
            let table = format!("table ip peers {{ chain requests {{ type nat hook prerouting priority dstnat ;\n{rules}}}\n}}");
            lab.director.run_with_input("nft", ["-f", "-"], &table)?;
            (vip, None)
        }
        Peer::Haproxy => {
            let listeners = per_port(&|port, servers| {
                let all: Vec<_> =
                    servers.iter().zip(1..).map(|(server, number)| format!(" server rs{number} {server}:{port}")).collect();
                format!("listen port{port}\n bind {vip}:{port} backlog 65535\n{}\n", all.join("\n"))
            });
            let text = format!(
                "global\n nbthread {processors}\n maxconn 4000\ndefaults\n mode tcp\n balance roundrobin\n timeout connect 5s\n timeout client \
                 60s\n timeout server 60s\n{listeners}"
            );
            (vip, start("haproxy", text, &["-db", "-f"])?)
        }
        Peer::Nginx => {
            let upstreams = per_port(&|port, servers| {
                let all = servers.iter().map(|server| format!("server {server}:{port} max_fails=0;")).collect::<Vec<_>>().join(" ");
                format!(
                    "upstream port{port} {{ zone port{port} 64k; {all} }}\nserver {{ listen {vip}:{port} backlog=65535; proxy_pass port{port}; }}\n"
                )
            });
            let text = format!(
                "load_module {STREAM_MODULE};\ndaemon off;\nworker_processes {processors};\npid {directory}/pid;\nerror_log {directory}/log;\nevents \
                 {{ worker_connections 4096; }}\nstream {{\n{upstreams}}}\n"
            );
            (vip, start("nginx", text, &["-e", "stderr", "-c"])?)
        }
        Peer::Bpfvs(..) => bail!("{peer} is started elsewhere"),
    })
}
