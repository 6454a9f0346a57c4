/* Sends about 20 s of simulated ride-hailing traffic through the ordinary ingest route, marked source=simulator. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const BATCHES = 20;
  const EVENTS = 40;
  const EVERY_MS = 1000;
  const CITY = { lat: 38.7223, lng: -9.1393 };
  const DRIVERS = 40;
  const RIDERS = 120;
  let sending = 0;
  let shown = false;

  const pick = (n) => Math.floor(Math.random() * n);
  const near = () => ({ lat: +(CITY.lat + (Math.random() - 0.5) * 0.06).toFixed(5), lng: +(CITY.lng + (Math.random() - 0.5) * 0.08).toFixed(5) });
  const id = (kind) => kind + "_" + Date.now().toString(36) + pick(1e9).toString(36);
  const envelope = (event_type, user_id, data) => ({ event_type, user_id, session_id: "session_" + user_id, timestamp: Date.now(),
    app_version: "1.4.2", device_type: Math.random() < 0.6 ? "android" : "ios", location: near(), data });

  /* One ride from request to payment; drivers differ, so that their features do too. */
  function ride() {
    const driver = pick(DRIVERS);
    const [driver_id, rider_id, request_id] = ["sample_driver_" + driver, "sample_rider_" + pick(RIDERS), id("req")];
    const accepted = Math.random() < 0.55 + (0.4 * driver) / DRIVERS;
    const events = [
      envelope("ui_interaction", rider_id, { screen: "map", element: "request_button" }),
      envelope("ride_request", rider_id, { request_id, pickup: near() }),
      envelope("ride_request_response", driver_id, { request_id, response: accepted ? "accepted" : "rejected", response_time: +(1 + Math.random() * 7).toFixed(1) }),
    ];
    if (!accepted) return events;
    if (Math.random() < 0.12) {
      events.push(envelope("ride_cancelled", rider_id, { request_id, cancelled_by: "rider" }));
      return events;
    }
    const distance_km = +(1 + Math.random() * 14).toFixed(1);
    const fare = +(2.5 + 0.9 * distance_km).toFixed(2);
    const transaction_id = id("tx");
    const odd = Math.random() < 0.05;
    events.push(envelope("ride_completed", driver_id, { request_id, fare, distance_km }),
      envelope("payment", rider_id, { transaction_id, amount: odd ? +(fare * 9).toFixed(2) : fare, merchant_id: driver_id }));
    if (Math.random() < 0.3) events.push(envelope("fraud_report", rider_id, { transaction_id, is_fraud: odd ? 1 : 0 }));
    return events;
  }

  function batch() {
    const events = [];
    while (events.length < EVENTS) events.push(...ride());
    return events.slice(0, EVENTS);
  }

  const say = (text) => nexus.setText(document.getElementById("sample-progress"), text);
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  async function send() {
    if (sending) return;
    let accepted = 0;
    try {
      for (sending = 1; sending <= BATCHES; sending += 1) {
        say(`sending simulated rides, ${sending} of ${BATCHES} s`);
        const said = await nexus.send("POST", "/api/ml/events/ingest", { events: batch(), source: "simulator" });
        accepted += (said && said.accepted) || 0;
        if (sending < BATCHES) await pause(EVERY_MS);
      }
      nexus.notify("Sample traffic sent", nexus.format.int(accepted) + " simulated events accepted.", false);
    } catch (error) {
      nexus.notify("Sample traffic stopped", error.message, true);
    }
    sending = 0;
    say("20 s of simulated rides, marked as such");
    paint(nexus.live.feed);
  }

  /* Offered only while nothing ever flowed; stays until its own sending is done. */
  function paint(feed) {
    const offer = document.getElementById("sample");
    if (!offer) return;
    shown = sending > 0 || (nexus.at(feed, "totals.accepted") === 0 && nexus.at(feed, "store.status") === "online");
    if (offer.hidden === shown) offer.hidden = !shown;
    const button = document.getElementById("sample-send");
    if (button) button.disabled = sending > 0;
  }
  nexus.painters.push(paint);

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.nexus = Object.assign(window.dash_clientside.nexus || {}, { sendSample: function () { send(); } });
})();
