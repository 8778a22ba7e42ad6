//! A lab with everything on: nginx on every real server, the virtual address where it belongs, a director that runs bpfvs.
//!
//! ```no_run
//! use bpfvs_tests::{balanced::Balanced, lab::{Family, Layout}, programs::curl};
//!
//! let balanced = Balanced::new(Layout::OneSegment, 2, &[])?;
//! balanced.service("rr", &["-g", "-g"])?;
//! assert_eq!(curl(&balanced.lab.client, balanced.lab.vip.of(Family::Ipv4))?, "rs2");
//! # anyhow::Ok(())
//! ```

use std::cell::Cell;

use anyhow::{Result, ensure};

use crate::{
    bpfvs::Bpfvs,
    lab::{Family, Lab, Layout},
    programs::{Nginx, host},
};

/// A lab in which requests are answered.
#[derive(Debug)]
pub struct Balanced {
    /// The daemon. First, because it has to go before the namespaces do.
    pub bpfvs: Bpfvs,
    /// The servers' nginx.
    pub nginx: Vec<Nginx>,
    /// The namespaces.
    pub lab: Lab,
    /// The real servers have our own decapsulation.
    decapsulates: Cell<bool>,
}

impl Balanced {
    /// Wires a layout and starts everything; `arguments` are those of `bpfvs serve`.
    pub fn new(layout: Layout, servers: u8, arguments: &[&str]) -> Result<Self> {
        Self::in_lab(Lab::new(layout, servers)?, arguments)
    }

    /// Starts everything in a lab.
    pub fn in_lab(lab: Lab, arguments: &[&str]) -> Result<Self> {
        // IPVS's how-to's tell the director not to send clients elsewhere.
        lab.director.sysctl(&[("net.ipv4.conf.all.send_redirects", "0"), ("net.ipv4.conf.eth0.send_redirects", "0")])?;
        let nginx = lab
            .servers
            .iter()
            .zip(1..)
            .map(|(server, number)| Nginx::start(server, &format!("rs{number}")))
            .collect::<Result<_>>()?;
        let bpfvs = Bpfvs::start(&lab.director, arguments)?;
        let balanced = Self { bpfvs, nginx, lab, decapsulates: Cell::new(false) };
        match balanced.lab.layout {
            Layout::Tunnel => balanced.set_up_tunnels(&[])?,
            Layout::Masquerade => {}
            _ => balanced.lab.add_vip_to_servers()?,
        }
        Ok(balanced)
    }

    /// `bpfvs realserver setup` on every real server, with our own decapsulation.
    pub fn set_up_tunnels(&self, options: &[&str]) -> Result<()> {
        self.decapsulates.set(true);
        for server in &self.lab.servers {
            let mut command = server.command(crate::bpfvs::binary()?);
            command.args(["realserver", "setup", "--method", "tunnel", "--decap", "bpf", "--interface", "eth0"]).args(options);
            for family in Family::ALL {
                command.args(["--vip", &self.lab.vip.of(family).to_string()]);
            }
            crate::netns::run(&mut command)?;
        }
        Ok(())
    }

    /// Types a TCP service on port 80 for both families, with the options of each real server, in the order rs1, rs2, ….
    pub fn service(&self, scheduler: &str, server_options: &[&str]) -> Result<()> {
        self.service_on("-t", 80, scheduler, server_options)
    }

    /// The same with `-t` or `-u` and a port.
    pub fn service_on(&self, protocol: &str, port: u16, scheduler: &str, server_options: &[&str]) -> Result<()> {
        ensure!(server_options.len() <= self.lab.servers.len(), "the lab has fewer real servers");
        for family in Family::ALL {
            let vip = host(self.lab.vip.of(family));
            self.bpfvs.ipvsadm(&format!("-A {protocol} {vip}:{port} -s {scheduler}"))?;
            for (address, options) in self.lab.server_addresses.iter().zip(server_options) {
                let address = host(address.of(family));
                self.bpfvs.ipvsadm(&format!("-a {protocol} {vip}:{port} -r {address}:{port} {options}"))?;
            }
        }
        self.bpfvs.wait_for_servers()
    }

    /// A real server's part of an `ipvsadm` line: `-t VIP:80 -r RIP:80`.
    pub fn server(&self, number: usize, family: Family) -> String {
        let (vip, address) = (host(self.lab.vip.of(family)), host(self.lab.server_addresses[number - 1].of(family)));
        format!("-t {vip}:80 -r {address}:80")
    }
}

impl Drop for Balanced {
    fn drop(&mut self) {
        if !self.decapsulates.get() {
            return;
        }
        // The pins of our own decapsulation outlive a namespace.
        for server in &self.lab.servers {
            if let Ok(binary) = crate::bpfvs::binary() {
                let _ = server.run(binary, ["realserver", "teardown"]);
            }
        }
    }
}
