//! The virtual machine itself, without bpfvs: other kernels boot, and the kernel's own IPVS balances.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    needs_machines,
    vm::{Kernel, Machine, Version, machine::ipvs},
};

/// Direct routing by the kernel's IPVS: a client and two real servers around the guest's own namespace.
const REAL_IPVS: &str = r#"
set -e
ip link add br0 type bridge
ip link set br0 up
ip addr add 10.0.0.204/24 dev br0
ip addr add 10.0.0.200/32 dev br0
sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.br0.send_redirects=0
number=205
for host in rs1 rs2 client; do
    ip netns add $host
    ip link add port-$host type veth peer name eth0 netns $host
    ip link set port-$host master br0 up
    ip -n $host link set lo up
    ip -n $host link set eth0 up
    ip -n $host addr add 10.0.0.$number/24 dev eth0
    number=$((number + 1))
done
for host in rs1 rs2; do
    ip netns exec $host sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2
    ip -n $host addr add 10.0.0.200/32 dev lo
    mkdir -p /srv/$host
    echo $host >/srv/$host/index.html
    ip netns exec $host busybox httpd -p 80 -h /srv/$host
done
ipvsadm -A -t 10.0.0.200:80 -s rr
ipvsadm -a -t 10.0.0.200:80 -r 10.0.0.205 -g
ipvsadm -a -t 10.0.0.200:80 -r 10.0.0.206 -g
for try in 1 2 3 4; do ip netns exec client busybox timeout 10 busybox wget -q -O - http://10.0.0.200/; done | tee answers
[ "$(grep -c rs1 answers)" = 2 ] && [ "$(grep -c rs2 answers)" = 2 ] && echo balanced
"#;

#[test]
fn the_kernels_own_ipvs_balances() -> Result<()> {
    needs_machines!();
    let outcome = Machine::new(Version::V6_12)?.modules(ipvs(Version::V6_12)).run(REAL_IPVS)?;
    ensure!(outcome.status == 0, "status {}: {}", outcome.status, outcome.output);
    ensure!(outcome.output.ends_with("balanced\n"), "{}", outcome.output);
    Ok(())
}

#[test]
fn output_and_status_come_back_from_the_oldest_kernel() -> Result<()> {
    needs_machines!();
    let outcome = Machine::new(Version::V6_1)?.run("uname -r; printf 'a\\r\\nb\\n'; lsmod | grep -c '^ipip '; exit 7")?;
    ensure!(outcome.status == 7, "status {}: {}", outcome.status, outcome.output);
    let release = Kernel::get(Version::V6_1)?.release;
    ensure!(outcome.output == format!("{release}\na\r\nb\n1\n"), "{:?}", outcome.output);
    Ok(())
}

#[test]
fn a_guest_that_dies_says_why() -> Result<()> {
    needs_machines!();
    let error = Machine::new(Version::V6_12)?.run("echo c >/proc/sysrq-trigger; sleep 100").unwrap_err();
    ensure!(format!("{error:#}").contains("sysrq triggered crash"), "{error:#}");
    Ok(())
}

#[test]
fn time_that_counts_instructions_repeats() -> Result<()> {
    needs_machines!();
    let script = "for n in $(seq 2000); do :; done; cut -d' ' -f1 /proc/uptime";
    let seconds = || -> Result<f64> { Ok(Machine::new(Version::V6_12)?.deterministic().run(script)?.output.trim().parse()?) };
    let (first, second) = (seconds()?, seconds()?);
    ensure!((first - second).abs() <= 0.02 * first, "{first} and {second} seconds");
    Ok(())
}
