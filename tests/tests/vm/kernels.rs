//! bpfvs on other kernels, in a virtual machine: it loads, attaches, and balances real HTTP requests, by direct routing and
//! through the kernel's own tunnel devices and VLANs, which the machine that runs the tests may not have.
//!
//! The guest is the director; client and real servers are namespaces around it, with busybox's httpd and wget. What the
//! scripts must print is what they print when the kernel's own IPVS is the director, which a test here proves.

use anyhow::{Result, ensure};
use bpfvs_tests::{
    bpfvs, needs_bpfvs, needs_machines,
    pass::object_file,
    vm::{Machine, Version, machine::ipvs},
};

/// The network, the daemon, and what the scripts below have in common. `$HOOK` says where bpfvs takes packets.
///
/// The director's interface is one end of a wire, not a bridge: as on any machine, packets come in and leave by it. The
/// bridge is in a namespace of its own.
const DIRECTOR: &str = r#"
set -eEu
trap 'echo "line $LINENO failed"; cat /run/bpfvs.log' ERR
ip netns add switch
ip -n switch link add bridge0 type bridge
ip -n switch link set bridge0 up
plug() { # namespace, number of its address
    local namespace=$1 number=$2
    if [ "$namespace" = director ]; then
        ip link add eth0 type veth peer name port-director netns switch
        set -- ip
    else
        ip netns add "$namespace"
        ip -n switch link add "port-$namespace" type veth peer name eth0 netns "$namespace"
        set -- ip -n "$namespace"
    fi
    ip -n switch link set "port-$namespace" master bridge0 up
    "$@" link set lo up
    "$@" link set eth0 up
    "$@" addr add 10.0.0.$number/24 dev eth0
    "$@" addr add fd00:10::$number/64 dev eth0 nodad
}
sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.all.rp_filter=0
plug director 204
plug client 12
plug rs1 205
plug rs2 206
ip addr add 10.0.0.200/32 dev eth0
ip addr add fd00:10::200/128 dev eth0 nodad preferred_lft 0 # not to be the source of what the director says itself
for host in client rs1 rs2 switch; do ip netns exec $host sysctl -qw net.ipv4.conf.all.rp_filter=0; done
if [ "$HOOK" = xdp ]; then
    # XDP on a veth pair wants complete checksums, and XDP at the far end: else what it sends waits for other traffic.
    for host in client rs1 rs2; do ip netns exec $host ethtool -K eth0 tx off >/dev/null; done
    ethtool -K eth0 tx off >/dev/null
    ip -n switch link set dev port-director xdpdrv object /root/pass.o section xdp
fi
for host in rs1 rs2; do
    ip netns exec $host sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2
    mkdir -p /srv/$host
    echo $host >/srv/$host/index.html
    ip netns exec $host busybox httpd -p 80 -h /srv/$host
    ip netns exec $host busybox httpd -p '[::]:80' -h /srv/$host 2>/dev/null || true
done
bpfvs serve --interface eth0 --hook $HOOK --state /run/state >/run/bpfvs.out 2>/run/bpfvs.log &
daemon=$!
disown # bash need not tell when it is killed
for try in $(seq 900); do grep -qx ready /run/bpfvs.out && break; sleep 0.1; done
grep -qx ready /run/bpfvs.out
ask() { # address, times
    for try in $(seq $2); do ip netns exec client busybox timeout 10 busybox wget -q -O - "http://$1/"; done | tr '\n' ' '
    echo
}
services() { # options of the real servers
    ipvsadm -A -t 10.0.0.200:80 -s rr
    ipvsadm -A -t '[fd00:10::200]:80' -s rr
    for number in 205 206; do
        ipvsadm -a -t 10.0.0.200:80 -r 10.0.0.$number:80 "$@"
        ipvsadm -a -t '[fd00:10::200]:80' -r "[fd00:10::$number]:80" "$@"
    done
    # The kernel resolves each real server once; then the first request is as any other.
    for number in 205 206; do
        ping -c1 -W5 10.0.0.$number >/dev/null
        ping -6 -c1 -W5 fd00:10::$number >/dev/null
    done
}
"#;

/// Direct routing, and a daemon that is killed and starts again.
const DIRECT_ROUTING: &str = r#"
for host in rs1 rs2; do
    ip -n $host addr add 10.0.0.200/32 dev lo
    ip -n $host addr add fd00:10::200/128 dev lo nodad
done
services -g
echo "route ipv4 $(ask 10.0.0.200 4)"
echo "route ipv6 $(ask '[fd00:10::200]' 4)"
kill -9 $daemon
while kill -0 $daemon 2>/dev/null; do sleep 0.1; done
echo "orphaned $(ask 10.0.0.200 2)"
bpfvs serve --interface eth0 --hook $HOOK --state /run/state >/run/bpfvs.out 2>>/run/bpfvs.log &
daemon=$!
disown # bash need not tell when it is killed
for try in $(seq 900); do grep -qx ready /run/bpfvs.out && break; sleep 0.1; done
echo "adopted $(ask 10.0.0.200 2)"
ipvsadm -Ln | grep -c Route
ipvsadm -C
for host in rs1 rs2; do
    ip -n $host addr del 10.0.0.200/32 dev lo
    ip -n $host addr del fd00:10::200/128 dev lo
done
"#;

const DIRECT_ROUTING_OUTPUT: &str =
    "route ipv4 rs2 rs1 rs2 rs1 \nroute ipv6 rs2 rs1 rs2 rs1 \norphaned rs2 rs1 \nadopted rs2 rs1 \n4\n";

/// Calls of SIP, each datagram by itself.
const CALLS: &str = r#"
for vip in 10.0.0.200 fd00:10::200; do
    case $vip in *:*) service=[$vip]:5060 servers='[fd00:10::205] [fd00:10::206]' ;; *) service=$vip:5060 servers='10.0.0.205 10.0.0.206' ;; esac
    ipvsadm -A -u $service -s rr -p 60 -o --pe sip
    for server in $servers; do ipvsadm -a -u $service -r $server:5060 -g; done
    for call in one two one; do
        printf 'OPTIONS sip:a SIP/2.0\r\nCall-ID: %s@%s\r\n\r\n' $call $vip | ip netns exec client bash -c "cat >/dev/udp/$vip/5060"
    done
done
for try in $(seq 50); do [ "$(ipvsadm -Lnc --persistent-conn | grep -c ' sip ')" = 4 ] && break; sleep 0.1; done
echo "calls: $(ipvsadm -Lnc --persistent-conn | grep ' sip ' | sed 's/.* //' | sort | tr '\n' ' ')"
ipvsadm -C
"#;

const CALLS_OUTPUT: &str = "calls: one@10.0.0.200 one@fd00:10::200 two@10.0.0.200 two@fd00:10::200 \n";

/// The end of a director.
const END: &str = r#"
bpfvs stop --detach
echo "left: $(ls /sys/fs/bpf/bpfvs/main 2>/dev/null || true) $(tc filter show dev eth0 ingress) $(ip link show dev eth0 | sed -n '/prog/p')"
"#;

const END_OUTPUT: &str = "left:   \n";

/// Real servers whose tunnels end in the kernel's own devices, set up as every how-to says.
const TUNNEL_DEVICES_BY_HAND: &str = r"
for host in rs1 rs2; do
    ip netns exec $host ip link set tunl0 up
    ip netns exec $host ip link set ip6tnl0 up
    ip netns exec $host sysctl -qw net.ipv4.conf.tunl0.rp_filter=0 net.ipv4.conf.tunl0.arp_ignore=1
    ip -n $host addr add 10.0.0.200/32 dev tunl0
    ip -n $host addr add fd00:10::200/128 dev ip6tnl0 nodad
done
teardown() { :; }
";

/// The same by bpfvs, which takes back what it did.
const TUNNEL_DEVICES_BY_BPFVS: &str = r"
state_of() { # namespace
    ip -n $1 -o addr show | sed 's/ *valid_lft.*//'
    ip -n $1 -o link show | sed 's/.*: \([^:@]*\)[:@].*<\([^>]*\)>.*/\1 \2/'
    ip netns exec $1 sysctl -a 2>/dev/null | grep -E '^net.ipv4.conf.*(arp_ignore|arp_announce|rp_filter)'
}
for host in rs1 rs2; do
    # A real server answers through its router, which here is the client.
    ip -n $host route add default via 10.0.0.12
    ip -n $host -6 route add default via fd00:10::12
    state_of $host >/run/before-$host
    bpfvs realserver setup --netns $host --interface eth0 --method tunnel --decap kernel --vip 10.0.0.200 --vip fd00:10::200 >/run/setup-$host
    bpfvs realserver check --netns $host >/run/check-$host || { cat /run/setup-$host /run/check-$host; false; }
done
teardown() {
    for host in rs1 rs2; do
        bpfvs realserver teardown --netns $host >/dev/null
        state_of $host | diff /run/before-$host -
    done
}
";

/// Tunnels that end in the kernel's own devices.
const TUNNELS: &str = r#"
services -i
echo "tunnel ipv4 $(ask 10.0.0.200 4)"
echo "tunnel ipv6 $(ask '[fd00:10::200]' 4)"
received() { ip -n rs1 -s link show dev $1 | awk '/RX:/ { getline; print ($2 > 0 ? "received" : "nothing") }'; }
echo "tunl0 $(received tunl0), ip6tnl0 $(received ip6tnl0)"
teardown
"#;

const TUNNELS_OUTPUT: &str = "tunnel ipv4 rs2 rs1 rs2 rs1 \ntunnel ipv6 rs2 rs1 rs2 rs1 \ntunl0 received, ip6tnl0 received\n";

/// The service is in VLAN 7, whose device on the director is eth0.7; its real servers are there, too, or in the untagged VLAN.
/// A bridge that filters proves it: each real server's port carries one of the two only.
const VLAN: &str = r#"
ip -n switch link set bridge0 type bridge vlan_filtering 1
join() { # host, number: takes part in VLAN 7
    ${enter-} ip link add link eth0 name eth0.7 type vlan id 7
    ${enter-} ip link set eth0.7 up
    ${enter-} ip addr add 10.7.0.$2/24 dev eth0.7
    ${enter-} ip addr add fd00:7::$2/64 dev eth0.7 nodad
    # What crosses a veth pair has its tag within the frame, as on a real wire. XDP sees no other.
    ${enter-} ethtool -K eth0 txvlan off >/dev/null
    ip netns exec switch ethtool -K port-$1 txvlan off >/dev/null
    bridge -n switch vlan add dev port-$1 vid 7
}
join director 204
ip addr add 10.7.0.200/32 dev eth0.7
ip addr add fd00:7::200/128 dev eth0.7 nodad preferred_lft 0
enter="ip netns exec client" join client 12
number=205
for host in rs1 rs2; do
    enter="ip netns exec $host" join $host $number
    bridge -n switch vlan del dev port-$host vid 1
    ip -n $host addr add 10.7.0.200/32 dev lo
    ip -n $host addr add fd00:7::200/128 dev lo nodad
    number=206
done
balance() { # the real servers' nets, and how they are reached
    local method=${3--g}
    ipvsadm -C
    ipvsadm -A -t 10.7.0.200:80 -s rr
    ipvsadm -A -t '[fd00:7::200]:80' -s rr
    for number in 205 206; do
        ping -c1 -W5 $1.$number >/dev/null
        ping -6 -c1 -W5 $2::$number >/dev/null
        ipvsadm -a -t 10.7.0.200:80 -r $1.$number:80 $method
        ipvsadm -a -t '[fd00:7::200]:80' -r "[$2::$number]:80" $method
    done
}
both() { echo "$1: $(ask 10.7.0.200 2)$(ask '[fd00:7::200]' 2)"; }
balance 10.7.0 fd00:7
both "the port alone"
ipvsadm -A -t 10.7.0.200:81 -s rr # without real servers
ip netns exec client busybox wget -q -O - http://10.7.0.200:81/ 2>&1 | grep -o 'Connection refused'
# XDP did it all.
[ $HOOK = tc ] || bpfvs stats --reasons | awk '/left to tc/ && $3 > 0'
ip addr add 10.7.0.230/32 dev eth0.7
ip addr add fd00:7::230/128 dev eth0.7 nodad preferred_lft 0
bpfvs localaddr add 10.7.0.230,fd00:7::230
balance 10.7.0 fd00:7 "-m --fullnat"
both "FULLNAT in the VLAN"
balance 10.7.0 fd00:7
bpfvs attach eth0.7 --hook tc
both "port and VLAN"
bpfvs detach eth0
both "the VLAN alone"
bpfvs attach eth0 --hook $HOOK
for host in rs1 rs2; do
    ip -n $host link del eth0.7
    bridge -n switch vlan del dev port-$host vid 7
    bridge -n switch vlan add dev port-$host vid 1 pvid untagged
    ip -n $host route add 10.7.0.0/24 via 10.0.0.12
    ip -n $host route add fd00:7::/64 via fd00:10::12
done
balance 10.0.0 fd00:10
both "untagged real servers"
ip addr add 10.0.0.230/32 dev eth0
ip addr add fd00:10::230/128 dev eth0 nodad preferred_lft 0
bpfvs localaddr add 10.0.0.230,fd00:10::230
bpfvs localaddr delete 10.7.0.230,fd00:7::230
balance 10.0.0 fd00:10 "-m --fullnat"
both "FULLNAT out of the VLAN"
ipvsadm -C
"#;

const VLAN_OUTPUT: &str = "the port alone: rs2 rs1 rs2 rs1 \nConnection refused\nFULLNAT in the VLAN: rs2 rs1 rs2 rs1 \nport and VLAN: rs2 rs1 rs2 rs1 \n\
the VLAN alone: rs2 rs1 rs2 rs1 \nuntagged real servers: rs2 rs1 rs2 rs1 \nFULLNAT out of the VLAN: rs2 rs1 rs2 rs1 \n";

/// FULLNAT, by a director and real servers in the segment of their clients: nobody needs a route.
const FULLNAT: &str = r#"
ip addr add 10.0.0.230/32 dev eth0
ip addr add fd00:10::230/128 dev eth0 nodad preferred_lft 0
bpfvs localaddr add 10.0.0.230,fd00:10::230
bpfvs realserver toa on --from 10.0.0.230 --from fd00:10::230 >/dev/null
services -m --fullnat --toa
echo "fullnat ipv4 $(ask 10.0.0.200 4)"
echo "fullnat ipv6 $(ask '[fd00:10::200]' 4)"
ip addr add fd00:10::201/128 dev eth0 nodad preferred_lft 0
ipvsadm -A -t '[fd00:10::201]:80' -s rr
for number in 205 206; do ipvsadm -a -t '[fd00:10::201]:80' -r 10.0.0.$number:80 -m --fullnat; done
echo "from ipv6 to ipv4 $(ask '[fd00:10::201]' 4)"
bpfvs localaddr list | awk '{ print $1, $3 }'
bpfvs realserver toa status | sed -n 's/.*shown: \([0-9]*\);.*/clients shown: \1/p'
ipvsadm -C
"#;

const FULLNAT_OUTPUT: &str = "fullnat ipv4 rs2 rs1 rs2 rs1 \nfullnat ipv6 rs2 rs1 rs2 rs1 \nfrom ipv6 to ipv4 rs2 rs1 rs2 rs1 \nADDRESS USED\n10.0.0.230 8\nfd00:10::230 4\nclients shown: 8\n";

/// Instead of bpfvs, for the kernel's own IPVS: there is nothing to serve and nothing to detach.
const STAND_IN: &str = r#"
bpfvs() {
    if [ "$1" = serve ]; then
        echo ready
        sleep 1000
    fi
}
"#;

fn assert_output(version: Version, hook: &str, script: &[&str], expected: &str) -> Result<()> {
    let machine = Machine::new(version)?.add(&bpfvs::binary()?, "/usr/local/bin/bpfvs")?.link("/usr/local/bin/ipvsadm", "bpfvs");
    let machine = machine.file("/root/pass.o", object_file()?);
    assert_output_of(machine, version, hook, script, expected)
}

fn assert_output_of(machine: Machine, version: Version, hook: &str, script: &[&str], expected: &str) -> Result<()> {
    let outcome = machine.run(&format!("HOOK={hook}\n{}", script.concat()))?;
    ensure!(
        outcome.status == 0 && outcome.output.ends_with(expected),
        "Linux {}, {hook}: status {}:\n{}",
        version.name(),
        outcome.status,
        outcome.output
    );
    Ok(())
}

#[test]
fn the_scripts_hold_for_the_kernels_own_ipvs() -> Result<()> {
    needs_machines!();
    let script = [STAND_IN, DIRECTOR, DIRECT_ROUTING, CALLS, TUNNEL_DEVICES_BY_HAND, TUNNELS, END];
    let expected = [DIRECT_ROUTING_OUTPUT, CALLS_OUTPUT, TUNNELS_OUTPUT, END_OUTPUT].concat();
    let machine = Machine::new(Version::V6_12)?.modules(ipvs(Version::V6_12)).modules(&["ip_vs_pe_sip"]);
    assert_output_of(machine, Version::V6_12, "IPVS", &script, &expected)
}

// What needs no guest of its own shares one: an emulated kernel takes most of a minute to verify a director. So tunnels end in the
// kernel's devices once on each kernel, and once behind each hook.

#[test]
fn direct_routing_and_fullnat_on_the_oldest_kernel() -> Result<()> {
    needs_machines!();
    needs_bpfvs!();
    let expected = [DIRECT_ROUTING_OUTPUT, CALLS_OUTPUT, FULLNAT_OUTPUT, END_OUTPUT].concat();
    assert_output(Version::V6_1, "xdp", &[DIRECTOR, DIRECT_ROUTING, CALLS, FULLNAT, END], &expected)
}

#[test]
fn direct_routing_fullnat_and_tunnel_devices_on_the_oldest_kernel() -> Result<()> {
    needs_machines!();
    needs_bpfvs!();
    let expected = [DIRECT_ROUTING_OUTPUT, CALLS_OUTPUT, FULLNAT_OUTPUT, TUNNELS_OUTPUT, END_OUTPUT].concat();
    let script = [DIRECTOR, DIRECT_ROUTING, CALLS, FULLNAT, TUNNEL_DEVICES_BY_BPFVS, TUNNELS, END];
    assert_output(Version::V6_1, "tc", &script, &expected)
}

#[test]
fn vlans_and_direct_routing_on_debians_newer_kernel() -> Result<()> {
    needs_machines!();
    needs_bpfvs!();
    let expected = [VLAN_OUTPUT, DIRECT_ROUTING_OUTPUT, CALLS_OUTPUT, END_OUTPUT].concat();
    assert_output(Version::V6_12, "tc", &[DIRECTOR, VLAN, DIRECT_ROUTING, CALLS, END], &expected)
}

#[test]
fn vlans_direct_routing_and_tunnel_devices_on_debians_newer_kernel() -> Result<()> {
    needs_machines!();
    needs_bpfvs!();
    let expected = [VLAN_OUTPUT, DIRECT_ROUTING_OUTPUT, CALLS_OUTPUT, TUNNELS_OUTPUT, END_OUTPUT].concat();
    let script = [DIRECTOR, VLAN, DIRECT_ROUTING, CALLS, TUNNEL_DEVICES_BY_BPFVS, TUNNELS, END];
    assert_output(Version::V6_12, "xdp", &script, &expected)
}
