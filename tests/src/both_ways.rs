//! Traffic through a director that sees both directions: bulk TCP with content that is checked, and narrow links.

use anyhow::{Result, ensure};

use crate::{
    balanced::Balanced,
    lab::{Family, Offloads},
    programs::{Download, IperfServer, iperf, iperf_reverse, upload},
};

/// Bulk TCP both ways by services whose servers have these options, with unfinished checksums and GSO packets, or without. XDP is
/// left with the offloads that it needs.
pub fn bulk(balanced: &Balanced, hook: &str, server_options: &[&str], states: &[Offloads]) -> Result<()> {
    balanced.service("rr", server_options)?;
    balanced.service_on("-t", 5201, "sh", server_options)?;
    let _servers = balanced.lab.servers.iter().map(IperfServer::start).collect::<Result<Vec<_>>>()?;
    for &offloads in states {
        if hook != "xdp" {
            balanced.lab.set_offloads(offloads)?;
        }
        for family in Family::ALL {
            let vip = balanced.lab.vip.of(family);
            for throughput in [iperf(&balanced.lab.client, vip, 1)?, iperf_reverse(&balanced.lab.client, vip, 1)?] {
                println!("{hook}, {offloads:?}, {family:?}: {:.0} Mbit/s", throughput.bits_per_second / 1e6);
                ensure!(throughput.bits_per_second > 20e6, "{offloads:?}, {family:?}: {throughput:?}");
            }
            Download::start(&balanced.lab.client, vip, "big")?.finish()?;
            upload(&balanced.lab.client, vip)?;
        }
    }
    Ok(())
}

/// Transfers towards the narrow one of the director's devices, by the service on port 80: the sender must be told. What comes in
/// by a narrow veth device must be narrow already.
pub fn towards(balanced: &Balanced, narrow: &str) -> Result<()> {
    for family in Family::ALL {
        let vip = balanced.lab.vip.of(family);
        if narrow == "eth0" {
            upload(&balanced.lab.client, vip)?;
        } else {
            Download::start(&balanced.lab.client, vip, "big")?.finish()?;
        }
    }
    Ok(())
}
